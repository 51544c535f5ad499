"""``python -m tools.gpu_check [--minutes 9] [--results FOLDER] [--only STEP ...] [--rehearse [BACKEND]]``."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tools.gpu_check
from tools.gpu_check import plan, steps
from tools.gpu_check.log import Log
from tools.gpu_check.record import Record

ROOT = steps.ROOT
FINISH_S = 5  # left for the last words


def machine_facts() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check.machine"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != 0:
        raise SystemExit(f"gpu-check: torch cannot be asked for its card:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> int:
    """0: every step ran and none failed; 1: something failed, was stopped or did not run; 2: there is no card."""
    begin = time.monotonic()
    steps.end_on_sigterm()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    facts = machine_facts()
    if facts["card"] is None and options.rehearse is None:
        print(
            "gpu-check: torch sees no CUDA device here; --rehearse runs the steps without one",
            file=sys.stderr,
        )
        return 2
    if options.rehearse is not None:
        facts = {**facts, "card": "rehearsal", "capability": None}
    name = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
    folder = options.results.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    todo = plan.steps(plan.Machine.here(facts["capability"], folder, options.rehearse or "cuda"))
    if options.only:
        known = [step.name for step in todo]
        if unknown := sorted(set(options.only) - set(known)):
            parser.error(f"--only must name steps among {', '.join(known)}; got {', '.join(unknown)}")
        todo = [step for step in todo if step.name in options.only]

    record = Record(folder, facts, options.minutes)
    seconds = 60 * options.minutes - FINISH_S - (time.monotonic() - begin)
    good = steps.run_all(todo, seconds, record, Log(folder / "log.txt"))
    print(f"\n{record.report()}\nresults: {folder}", flush=True)
    return 0 if good else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=tools.gpu_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="for everything (default %(default)g)")
    add(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="the folder that gets a folder named after the card (default benchmarks/results)",
    )
    add("--only", nargs="+", metavar="STEP", help="these steps only")
    add(
        "--rehearse",
        nargs="?",
        const="cpu-portable",
        metavar="BACKEND",
        help="without a card: tiny shapes on the CPU, a backend of the tests in its place (default %(const)s; simt)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
