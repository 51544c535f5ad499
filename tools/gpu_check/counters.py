"""``python -m tools.gpu_check.counters``: what the card's own counters say of each kernel, by Nsight Compute.

Every problem is one run of ``lagkv profile --once`` under ``ncu``; results are written after each.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.record import replace
from tools.gpu_check.steps import ROOT

# Names of ncu, and the names in the results.
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
}
# The most used layer first; arguments of ``lagkv profile``.
_LLAMA = "--heads 8 --dim 128 --tokens 32768"
PROBLEMS = {
    "llama-3.1-8b 32k bfloat16 std": f"{_LLAMA} --dtype bfloat16 --ragged",
    "llama-3.1-8b 32k float32 std": f"{_LLAMA} --dtype float32",
    "llama-3.1-8b 32k bfloat16 cosine": f"{_LLAMA} --dtype bfloat16 --score cosine",
    "gemma-3-270m 32k bfloat16 std": "--heads 1 --dim 256 --tokens 32768 --dtype bfloat16",
}
TINY = "--heads 1 --dim 32 --tokens 512"


def ncu_command(ncu: str, arguments: str, device: str, log: Path) -> list[str]:
    target = [sys.executable, "-m", "lagkv_ext.commands.profile", "--once", "--device", device]
    return [
        *(ncu, "--csv", "--print-units", "base", "--log-file", str(log), "--metrics", ",".join(METRICS)),
        # Clocks are left as they are: the machine is shared.
        *("--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name-base", "demangled", "--kernel-name", "regex:lagkv::cuda"),
        *(*target, *arguments.split()),
    ]


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The kernel launches in ncu's table of one metric a row; whatever stands before the table is passed over."""
    rows = iter(lines)
    header = next((line for line in rows if line.startswith('"ID"')), None)
    if header is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader([header, *(line for line in rows if line.startswith('"'))]):
        launch = launches.setdefault(row["ID"], {"kernel": short_name(row["Kernel Name"])})
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            launch[name] = number(row["Metric Value"])
    return list(launches.values())


def number(text: str) -> float | None:
    """ncu groups digits with commas, and writes n/a for a counter that the card does not have."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def short_name(signature: str) -> str:
    """``compress_kernel<...>`` of a demangled signature: without result, namespaces and parameters."""
    name = signature.split(">(")[0] + ">" if ">(" in signature else signature.split("(")[0]
    return name.removeprefix("void ").replace("lagkv::cuda::", "").replace("lagkv::", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where ncu failed, with what it said."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.counters", description=__doc__)
    parser.add_argument("--ncu", default="ncu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: the first problem alone, tiny")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    content: dict[str, Any] = {"schema": 1, "problems": {}}
    failed = False
    for name, problem in list(PROBLEMS.items())[: 1 if options.tiny else None]:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "ncu.csv"
            problem = f"{problem} {TINY}" if options.tiny else problem
            done = subprocess.run(
                ncu_command(options.ncu, problem, options.device, log), cwd=ROOT, check=False
            )
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        launches = parse(text.splitlines())
        print(f"{name}: {len(launches)} kernel launches", flush=True)
        if done.returncode != 0 or not launches:
            print("\n".join(text.splitlines()[-10:]) or f"ncu ended with {done.returncode} and no table")
            failed = True
            continue
        content["problems"][name] = launches
        replace(options.json, json.dumps(content, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
