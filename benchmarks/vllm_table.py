"""``python -m benchmarks.vllm_table FILE.jsonl``: rows of ``vllm_simulation`` as the table of docs/vllm.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.vllm_machines import MACHINES

COLUMNS = (
    "machine, trace, conversations a second",
    "keep of 128",
    "requests",
    "tokens/s",
    "first token, median (s)",
    "95% (s)",
    "running",
    "preemptions",
    "of prompts cached",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}\n"


def table(path: Path) -> str:
    """Markdown, in the order of the file; machine and trace are named where they change."""
    lines, before = [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = (row["machine"], row["trace"], row["rate"])
        name = "" if key == before else f"{MACHINES[row['machine']].name}, {row['trace']}, {row['rate']:g}"
        before = key
        values = [
            "all (stock)" if row["stock"] else row["keep"],
            f"{row['requests']:,}",
            f"{row['tokens_per_second']:,.0f}",
            _seconds(row["first_token_median"]),
            _seconds(row["first_token_p95"]),
            f"{row['running_mean']:.1f}",
            row["preemptions"],
            f"{row['hit_ratio']:.0%}",
        ]
        lines.append(f"| {name} | {' | '.join(map(str, values))} |\n")
    return HEAD + "".join(lines)


def _seconds(value: Any) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="what --json of the simulation wrote")
    print(table(parser.parse_args().rows), end="")


if __name__ == "__main__":
    main()
