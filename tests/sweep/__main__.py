"""Sweep the families: ``python -m tests.sweep [--family NAME ...] [--jobs 2] [--json FILE] [--markdown]``.

Exits with 1 where a family is served and something comes out otherwise, or where its process did not end.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.generation  # imported before there are processes, once for all of them
import transformers.models.auto.modeling_auto

from tests.sweep import families, table, workers
from tests.sweep.verdict import DIFFERENT, Verdict, judge


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument(
        "--family", nargs="+", metavar="NAME", help="model types; default: all of the installed transformers"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="families at the same time, each with one thread (default 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--markdown", action="store_true", help="print tables of the results")
    chosen = parser.parse_args(arguments)
    names = chosen.family or families.families()
    unknown = sorted(set(names) - set(families.families()))
    if unknown:
        parser.error(f"no decoders of transformers {transformers.__version__}: {', '.join(unknown)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verdicts: list[Verdict] = []
    for name, result in workers.run(names, _judge_family, chosen.jobs):
        found = (
            [Verdict(name, DIFFERENT, str(result))]
            if isinstance(result, workers.Failure)
            else [Verdict.of_json(x) for x in result]
        )
        verdicts += found
        for verdict in found:
            print(table.line(verdict), file=sys.stderr if chosen.markdown else sys.stdout, flush=True)
    verdicts.sort(key=lambda x: x.case)
    if chosen.json:
        chosen.json.write_text(table.to_json(verdicts))
    if chosen.markdown:
        print(table.markdown(transformers.__version__, verdicts))
    counts = {x.status: sum(y.status == x.status for y in verdicts) for x in verdicts}
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())), file=sys.stderr)
    return 1 if DIFFERENT in counts else 0


def _judge_family(name: str) -> list[dict[str, Any]]:
    return json.loads(table.to_json(judge(case) for case in families.cases(name)))["verdicts"]


if __name__ == "__main__":
    raise SystemExit(main())
