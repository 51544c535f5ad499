"""``python -m benchmarks.record NAME``: every measurement of docs/performance.md, into benchmarks/results/NAME.

One JSON file per step, as the step's own command writes it, and ``record.json`` with commands, times and outcomes.
``python -m benchmarks.tables`` makes the tables of docs/performance.md. Steps run one after the other, the most
important first; those that would start after ``--minutes`` are left out by name. On an idle machine of two cores all of
them take about a quarter of an hour: fewer turns and shapes than ``benchmarks.run`` takes by itself, the same checks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import ROOT, commit, machine, shown_arguments

RESULTS = ROOT / "benchmarks" / "results"
_BESIDE_COPY = "compress_,compress,copy,clone"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of this package. ``tiny``: arguments appended for a try, which override those before."""

    name: str
    module: str
    arguments: str
    tiny: str
    kvpress: bool = False
    environment: tuple[str, ...] = ()  # NAME=VALUE

    def command(self, path: Path, *, tiny: bool, kvpress_python: str | None) -> list[str]:
        made = [sys.executable, "-m", f"benchmarks.{self.module}", *self.arguments.split()]
        if tiny:
            made += self.tiny.split()
        if self.kvpress and kvpress_python is not None:
            made += ["--kvpress-python", kvpress_python]
        return [*made, "--json", str(path)]


def _run(name: str, arguments: str, **options: Any) -> Step:
    return Step(name, "run", f"{arguments} --no-model-cuda", "--tokens 512,1k --rounds 2", **options)


_CACHE = "--tokens 512,1k --rounds 1"
STEPS = (
    _run("operators", "--tokens 32k --threads 1 --rounds 11 --budget 5", kvpress=True),
    Step("fixed-cost", "fixed_cost", "--threads 1", "--layers 2 --rounds 2"),
    _run(
        "two-threads",
        f"--tokens 32k --threads 2 --rounds 11 --budget 4 --contenders {_BESIDE_COPY},compiled,eager",
    ),
    # torch's own switch for huge pages under large new tensors; it is read once, when a process starts.
    _run(
        "huge-pages",
        f"--tokens 32k --dtype float32 --threads 1 --rounds 9 --budget 4 --contenders {_BESIDE_COPY},compiled,eager",
        environment=("THP_MEM_ALLOC_ENABLE=1",),
    ),
    _run(
        "linear",
        "--shapes qwen2.5-7b --tokens 4k,16k,64k,256k,1m --dtype bfloat16 --threads 1 --rounds 9 --budget 3 "
        f"--contenders {_BESIDE_COPY}",
    ),
    _run(
        "shapes",
        "--shapes llama-3.1-8b,gemma-3-270m --tokens 4k,128k --threads 1 --rounds 9 --budget 3 "
        f"--contenders {_BESIDE_COPY}",
    ),
    Step("append", "cache", "append --tokens 32k --rounds 15", _CACHE),
    Step("decode-llama", "cache", "decode --tokens 4k,8k,16k,32k --rounds 7", _CACHE),
    Step(
        "decode-gemma",
        "cache",
        "decode --model gemma3-270m --fill --tokens 4k,8k,16k,32k --rounds 7",
        "--tokens 512 --rounds 1",
    ),
    Step("prefill", "cache", "prefill --tokens 16k", "--tokens 1k --chunk 256"),
    _run(
        "cosine",
        "--tokens 32k --threads 1 --score cosine --rounds 9 --budget 4 --contenders compress_,compress,copy,clone",
    ),
    _run(
        "portable",
        "--tokens 4k --dtype bfloat16,float16,float32 --threads 1 --rounds 9 --budget 4 "
        "--contenders compress_,compress_-avx2,compress_-portable,copy",
    ),
    Step(
        "gemma-reads", "cache", "decode --model gemma3-270m --tokens 4k --rounds 3", "--tokens 512 --rounds 1"
    ),
)


def shown(command: Sequence[str], environment: Sequence[str] = ()) -> str:
    return shlex.join([*environment, "python", *shown_arguments(command[1:])])


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a step failed or was left out; 2 where the arguments are refused."""
    options = make_parser().parse_args(arguments)
    known = {step.name: step for step in STEPS}
    names = list(known) if options.only is None else [part.strip() for part in options.only.split(",")]
    if unknown := [name for name in names if name not in known]:
        print(f"error: unknown step {unknown[0]!r}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.name):
        print(
            f"error: NAME must be lower-case letters, digits, '.' and '-', got {options.name!r}",
            file=sys.stderr,
        )
        return 2
    folder = options.results / options.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": {}}
    record |= {"name": options.name, "machine": machine("cpu")}
    begin = time.monotonic()
    bad = []
    for name in names:
        step = known[name]
        target = folder / f"{name}.json"
        command = step.command(target, tiny=options.tiny, kvpress_python=options.kvpress_python)
        if time.monotonic() - begin > 60 * options.minutes:
            print(f"\n== {name}: left out, {options.minutes:g} minutes are over", flush=True)
            bad.append(name)
            continue
        print(f"\n== {name}: {shown(command, step.environment)}", flush=True)
        target.unlink(missing_ok=True)
        started = time.monotonic()
        environment = os.environ | dict(setting.split("=", 1) for setting in step.environment)
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        seconds = time.monotonic() - started
        record["steps"][name] = {
            "command": shown(command, step.environment),
            "commit": commit(),
            "seconds": round(seconds, 1),
            "exit": code,
        }
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"== {name}: exit {code} after {seconds:.0f} s", flush=True)
        if code:
            bad.append(name)
    print(
        f"\n{folder}: {len(names) - len(bad)} of {len(names)} steps in {(time.monotonic() - begin) / 60:.1f} minutes"
    )
    if bad:
        print(f"failed or left out: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.record",
        description="All measurements into benchmarks/results/NAME.",
        epilog="steps: " + ", ".join(step.name for step in STEPS),
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="of the machine, as zen4-2cores: a folder in benchmarks/results")
    add("--only", metavar="STEPS", help="these steps, commas between; the others' files stay as they are")
    add("--minutes", type=float, default=20.0, help="no step starts after so many (default %(default)g)")
    add("--tiny", action="store_true", help="a try of everything on tiny shapes; the numbers mean nothing")
    add("--kvpress-python", metavar="PATH", help="an interpreter that has kvpress")
    add("--results", type=Path, default=RESULTS, help="the folder above (default benchmarks/results)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
