"""``make gpu-check``: everything that only a card can show, in one go, offline, with the torch that is there.

Builds the libraries for this card, runs the tests marked ``gpu``, compute-sanitizer on the operator suite, and the
benchmarks; leaves ``gpu-check-<card>.json`` and ``.txt`` in the output folder. Exit status 0 only if every step passed.
Needs beside torch only pytest, hypothesis, ninja and pybind11.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The sanitizer slows kernels by orders of magnitude: the suite with few examples finds what it can find.
SANITIZER_TESTS = ("tests/ops/test_properties.py", "--backend", "cuda", "--hypothesis-profile", "dev", "-q")
# A card that is not seen (under the sanitizer, say) is a failure and not a suite of skipped tests.
REQUIRED = ("--require-backend", "cuda")


class Check:
    """One step: a command, whether it passed, how long it took and the end of what it printed."""

    def __init__(
        self, name: str, command: list[str], timeout_s: int, env: dict[str, str] | None = None
    ) -> None:
        self.name, self.command, self.timeout_s, self.env = name, command, timeout_s, env or {}

    def run(self) -> dict:
        print(f"== {self.name}: {' '.join(self.command)}", flush=True)
        begin = time.monotonic()
        try:
            done = subprocess.run(
                self.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self.env},
                capture_output=True,
                text=True,
                check=False,
                timeout=self.timeout_s,
            )
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            status = 124
            output = f"{_text(late.stdout)}{_text(late.stderr)}\nstopped after {self.timeout_s} s"
        except OSError as error:
            status, output = 127, str(error)
        verdict = "passed" if status == 0 else "FAILED"
        tail = output.strip().splitlines()[-25:]
        print("\n".join(tail[-3:]), f"\n   {verdict} in {time.monotonic() - begin:.0f} s", flush=True)
        return {
            "name": self.name,
            "command": self.command,
            "verdict": verdict,
            "exit_status": status,
            "seconds": round(time.monotonic() - begin, 1),
            "tail": tail,
        }


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def checks(out: Path, capability: tuple[int, int], sanitizer: str | None, minutes: float) -> list[Check]:
    python = sys.executable
    limit = int(minutes * 60)
    arch = {"TORCH_CUDA_ARCH_LIST": f"{capability[0]}.{capability[1]}", "LAGKV_BUILD_CUDA": "1"}
    steps = [
        Check("build", [python, "setup.py", "build_ext", "--inplace"], limit, arch),
        Check("info", [python, "-m", "lagkv_ext", "info"], 120),
        Check(
            "tests",
            [
                python,
                "-m",
                "pytest",
                "-m",
                "gpu",
                *REQUIRED,
                "--hypothesis-profile",
                "ci",
                "-q",
                f"--junitxml={out / 'gpu-tests.xml'}",
            ],
            limit,
        ),
        Check(
            "benchmarks",
            [python, "-m", "benchmarks.run", "--device", "cuda", "--json", str(out / "gpu-benchmarks.json")],
            limit,
        ),
    ]
    if sanitizer is not None:
        steps += [
            Check(
                f"sanitizer {tool}",
                [
                    sanitizer,
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "9",
                    python,
                    "-m",
                    "pytest",
                    *SANITIZER_TESTS,
                    *REQUIRED,
                ],
                limit,
                # The caching allocator hides overruns: every tensor its own allocation.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in SANITIZER_TOOLS
        ]
    return steps


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    beside = Path(home) / "bin" / "compute-sanitizer"
    return str(beside) if beside.exists() else shutil.which("compute-sanitizer")


def machine() -> dict:
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": card.name if card else "no CUDA device",
        "capability": [card.major, card.minor] if card else None,
        "memory_bytes": card.total_memory if card else None,
        "multiprocessors": card.multi_processor_count if card else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def summary(facts: dict, results: list[dict], notes: list[str]) -> str:
    lines = [f"{name}: {value}" for name, value in facts.items()] + [""]
    lines += [f"{r['verdict']:<8} {r['seconds']:>7.1f} s  {r['name']}" for r in results]
    lines += [f"NOT RUN  {note}" for note in notes]
    for result in results:
        if result["verdict"] == "FAILED":
            lines += ["", f"--- {result['name']} (exit status {result['exit_status']}), end of its output:"]
            lines += result["tail"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the reports"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="run these steps only, by the first word of their name"
    )
    parser.add_argument("--minutes", type=float, default=60, help="limit of every step")
    options = parser.parse_args(arguments)

    facts = machine()
    notes: list[str] = []
    results: list[dict] = []
    if facts["capability"] is None:
        notes.append("every step: torch sees no CUDA device here")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        sanitizer = find_sanitizer()
        if sanitizer is None:
            notes.append("compute-sanitizer: not found in CUDA_HOME/bin or on PATH")
        steps = checks(options.out.resolve(), tuple(facts["capability"]), sanitizer, options.minutes)
        if options.only:
            known = {step.name.split()[0] for step in steps}
            if unknown := set(options.only) - known:
                parser.error(f"--only must name steps among {sorted(known)}, got {sorted(unknown)}")
            steps = [step for step in steps if step.name.split()[0] in options.only]
        results = [step.run() for step in steps]

    report = summary(facts, results, notes)
    print(report)
    if results:
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["card"]).strip("-").lower()
        target = options.out / f"gpu-check-{name}"
        target.with_suffix(".txt").write_text(report, encoding="utf-8")
        data = {"machine": facts, "steps": results, "not_run": notes}
        target.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        print(f"written: {target}.json, {target}.txt")
    return 0 if results and not notes and all(r["verdict"] == "passed" for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
