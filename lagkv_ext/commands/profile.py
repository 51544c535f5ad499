"""``lagkv profile``: where the time of one compression goes, stage by stage, beside what copying the same cache takes.

Needs torch alone: ``python -m lagkv_ext.commands.profile`` is the same command without typer.

Labels. Torch's dispatcher reports every operator call to ``torch.profiler``, as ``lagkv::compress`` and so on and with
shapes, while a profiler runs; without one it looks at one thread-local flag. So the operators carry no labels of their
own: a ``record_function`` around a call costs microseconds even where nobody listens. The same callback makes NVTX
ranges of the calls for Nsight Systems, under ``torch.autograd.profiler.emit_nvtx()``: ``--once`` does that on CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lagkv_ext._library import info
from lagkv_ext.arguments import BUDGETS, FLOATING, SCORES
from lagkv_ext.commands import timing
from lagkv_ext.commands.stages import COPY, Call, make_calls, needed_bytes
from lagkv_ext.commands.traffic import Problem
from lagkv_ext.ops import DEFAULT_KEEP_RATIO, resolve_keep
from lagkv_ext.settings_file import read_settings

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}


class ProfileError(ValueError):
    """Arguments that cannot be profiled here; the message says why and what can."""


@dataclass(frozen=True)
class Stage:
    """``least_bytes`` as in `Problem.least_bytes`; ``copy_share``: its rate over the copy's, round by round."""

    name: str
    what: str
    seconds: timing.Spread
    least_bytes: int
    copy_share: float

    @property
    def gb_per_s(self) -> float:
        return self.least_bytes / self.seconds.median / 1e9


@dataclass(frozen=True)
class Kernel:
    """One CUDA kernel launch of a stage, as CUPTI reports it."""

    stage: str
    name: str
    microseconds: float
    grid: tuple[int, ...]
    block: tuple[int, ...]
    registers: int
    shared_bytes: int
    occupancy_percent: float | None  # estimated from registers, shared memory and grid


@dataclass(frozen=True)
class Profile:
    """Result of `profile`; ``print`` it for a table, `to_dict` for JSON."""

    problem: Problem
    device: str
    facts: dict[str, Any]
    cache: str
    stages: tuple[Stage, ...]
    kernels: tuple[Kernel, ...]
    no_kernels: str  # why there are none

    def to_dict(self) -> dict[str, Any]:
        problem = {
            **dataclasses.asdict(self.problem),
            "dtype": str(self.problem.dtype).removeprefix("torch."),
        }
        return {
            "problem": {**problem, "rows": self.problem.rows, "partitions": self.problem.partitions},
            "device": self.device,
            "facts": self.facts,
            "cache": self.cache,
            "stages": [{**dataclasses.asdict(x), "gb_per_s": x.gb_per_s} for x in self.stages],
            "kernels": [dataclasses.asdict(x) for x in self.kernels],
            "no_kernels": self.no_kernels,
        }

    def __str__(self) -> str:
        p, f = self.problem, self.facts
        where = f["gpu"] or f"{f['threads']} threads, {f['cpu_isa']}"
        dims = str(p.key_dim) if p.key_dim == p.value_dim else f"{p.key_dim}+{p.value_dim}"
        lines = [
            f"[{p.batch}, {p.heads}, {p.tokens}, {dims}] {str(p.dtype).removeprefix('torch.')} on {self.device} "
            f"({where}), caches {self.cache}",
            f"start {p.start}, lag_size {p.lag_size}, keep {p.keep}, score {p.score}: {p.partitions} partitions, "
            f"{p.tokens} -> {p.rows} rows, cache {p.cache_bytes / 1e6:.1f} MB",
            "",
            f"{'stage':17}{'us':>11}{'quartiles':>23}{'MB':>9}{'GB/s':>8}{'of copy':>9}",
        ]
        for x in self.stages:
            us = x.seconds.scaled(1e6)
            lines.append(
                f"{x.name:17}{us.median:11.1f}{us.q1:12.1f} ..{us.q3:8.1f}{x.least_bytes / 1e6:9.2f}{x.gb_per_s:8.2f}"
                f"{100 * x.copy_share:8.0f}%  {x.what}"
            )
        lines.append(
            "MB: the least any method reads and writes; GB/s and share of the measured copy follow from it"
        )
        if self.no_kernels:
            lines.append(f"launch plan, registers, occupancy: {self.no_kernels}")
        for k in self.kernels:
            occupancy = "unknown" if k.occupancy_percent is None else f"{k.occupancy_percent:.0f}%"
            lines.append(
                f"{k.stage}: {k.name} {k.microseconds:.1f} us, grid {list(k.grid)}, block {list(k.block)}, "
                f"{k.registers} registers, {k.shared_bytes} B shared, occupancy {occupancy}"
            )
        return "\n".join(lines)


def profile(
    problem: Problem,
    *,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 21,
    cold: bool = True,
    ragged: bool = False,
    seed: int = 0,
) -> Profile:
    """Time every stage of one problem, in turns (see `timing.measure`).

    Args:
        problem: shapes and parameters.
        device: "cpu", "cuda", "cuda:1", ...
        threads: CPU threads; torch's current number by default. Restored afterwards.
        cold: empty the last-level cache before every run.
        ragged: also the same sequences in slots, packed and in pages, by the ragged operators.

    Raises:
        ProfileError: a device or kernels that are not there, threads out of range, too little memory (said before any
            is taken).
    """
    target = check_device(device)
    with _threads(threads):
        _check_memory(problem, target, ragged)
        calls = make_calls(problem, target, seed, ragged=ragged)
        with torch.no_grad():
            measured = timing.measure(
                [timing.Candidate(call.name, call.run, call.restore) for call in calls],
                device=target,
                rounds=rounds,
                cold=cold,
            )
        copied = problem.least_bytes("copy")
        stages = []
        for call in calls:
            least = problem.least_bytes(call.operator)
            share = least / copied * measured.ratio(COPY, call.name).median
            stages.append(Stage(call.name, call.what, measured.seconds(call.name), least, share))
        if target.type == "cuda":
            kernels = _cuda_kernels(calls, target)
            no_kernels = "" if kernels else "the profiler saw no kernel (is CUPTI there?)"
        else:
            kernels = ()
            no_kernels = "only on CUDA" + ("" if torch.cuda.is_available() else f", and {_no_cuda()}")
            no_kernels += "; registers without a GPU: make kernel-report"
        facts = {
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(target) if target.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "cpu_isa": info()["cpu_isa"],
            "load": os.getloadavg()[0],
        }
    return Profile(
        problem, str(target), facts, "cold" if cold else "warm", tuple(stages), kernels, no_kernels
    )


def write_trace(
    problem: Problem,
    path: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    ragged: bool = False,
    seed: int = 0,
) -> None:
    """A Chrome trace (chrome://tracing, Perfetto) of every stage, three times; gzipped where the name ends with .gz."""
    target = check_device(device)
    with _threads(threads), torch.no_grad():
        _check_memory(problem, target, ragged)
        calls = make_calls(problem, target, seed, ragged=ragged)
        for call in calls:
            call.run()
        with _profiler(target, record_shapes=True) as profiler:
            for _ in range(3):
                for call in calls:
                    call.restore()
                    with torch.profiler.record_function(f"lagkv profile: {call.name}"):
                        call.run()
            _synchronize(target)
        profiler.export_chrome_trace(str(path))


def run_once(
    problem: Problem, *, device: str = "cpu", threads: int | None = None, ragged: bool = False, seed: int = 0
) -> None:
    """Every stage once after a warm-up, between cudaProfilerStart and -Stop and with NVTX ranges: for ncu and nsys."""
    target = check_device(device)
    with _threads(threads), torch.no_grad():
        calls = make_calls(problem, target, seed, ragged=ragged)
        for call in calls:
            call.run()
        for call in calls:
            call.restore()
        _synchronize(target)
        on_cuda = target.type == "cuda"
        with torch.cuda.profiler.profile() if on_cuda else contextlib.nullcontext():
            with (
                torch.autograd.profiler.emit_nvtx(record_shapes=True) if on_cuda else contextlib.nullcontext()
            ):
                for call in calls:
                    call.run()
            _synchronize(target)


def ncu_command(problem: Problem, device: str = "cuda", *, ragged: bool = False) -> str:
    """The Nsight Compute command line that goes further: every metric of every lagkv kernel of this problem."""
    command = [
        sys.executable,
        "-m",
        "lagkv_ext.commands.profile",
        "--once",
        "--device",
        device,
        *_arguments(problem),
    ]
    command += ["--ragged"] if ragged else []
    options = "ncu --set full --import-source on --profile-from-start off --kernel-name-base demangled"
    return f"{options} --kernel-name regex:lagkv::cuda --export lagkv-profile --force-overwrite {shlex.join(command)}"


def check_device(device: str) -> torch.device:
    """The device, or ProfileError: unknown, or not there, or its kernels not loaded."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ProfileError(f"unknown device {device!r}; known: cpu, cuda, cuda:INDEX")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ProfileError(f"unknown device {device!r}; known: cpu, cuda, cuda:INDEX") from error
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ProfileError(f"device {device}: {_no_cuda()}")
        if (target.index or 0) >= torch.cuda.device_count():
            raise ProfileError(f"device {device}: there are {torch.cuda.device_count()} CUDA devices")
        if (status := info()["cuda_kernels"]) != "loaded":
            raise ProfileError(f"device {device}: the CUDA kernels are {status}")
    return target


def kernels_of_trace(trace: dict[str, Any], stage: str) -> list[Kernel]:
    """The kernel launches in a Chrome trace of torch.profiler, in order of time."""
    events = [e for e in trace.get("traceEvents", []) if e.get("cat") == "kernel"]
    found = []
    for event in sorted(events, key=lambda e: e["ts"]):
        args = event["args"]
        found.append(
            Kernel(
                stage=stage,
                name=_without_parameters(event["name"]).removeprefix("void "),
                microseconds=float(event["dur"]),
                grid=tuple(args["grid"]),
                block=tuple(args["block"]),
                registers=int(args["registers per thread"]),
                shared_bytes=int(args["shared memory"]),
                occupancy_percent=args.get("est. achieved occupancy %"),
            )
        )
    return found


def _without_parameters(signature: str) -> str:
    """``f<T, (Score)0>`` of ``f<T, (Score)0>(P)``."""
    depth = 0
    for i in range(len(signature) - 1, -1, -1):
        depth += (signature[i] == ")") - (signature[i] == "(")
        if depth == 0:
            return signature[:i] if signature[i] == "(" else signature
    return signature


def _cuda_kernels(calls: Sequence[Call], target: torch.device) -> tuple[Kernel, ...]:
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        for call in calls:
            if call.name == COPY:
                continue
            call.restore()
            _synchronize(target)
            with _profiler(target) as profiler:
                call.run()
                _synchronize(target)
            profiler.export_chrome_trace(str(path))
            kernels += kernels_of_trace(json.loads(path.read_text(encoding="utf-8")), call.name)
    return tuple(kernels)


def _check_memory(p: Problem, device: torch.device, ragged: bool) -> None:
    need, free = needed_bytes(p, ragged=ragged), timing.available_bytes(device)
    if need > 0.9 * free:
        raise ProfileError(
            f"this problem needs {need / 1e9:.2f} GB on {device} (caches and results), {free / 1e9:.2f} GB are free"
        )


def _profiler(device: torch.device, **options: Any) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, **options)


@contextlib.contextmanager
def _threads(count: int | None):
    if count is None:
        yield
        return
    cores = os.cpu_count() or 1
    if not 1 <= count <= cores:
        raise ProfileError(f"threads must be between 1 and {cores} here, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _no_cuda() -> str:
    return (
        f"torch {torch.__version__} has no CUDA"
        if torch.version.cuda is None
        else "torch sees no CUDA device"
    )


def _arguments(p: Problem) -> list[str]:
    """The options that make this problem again."""
    made = {
        "batch": p.batch,
        "heads": p.heads,
        "tokens": p.tokens,
        "dim": p.key_dim,
        "value-dim": p.value_dim,
        "dtype": str(p.dtype).removeprefix("torch."),
        "sink-size": p.start,
        "lag-size": p.lag_size,
        "keep": p.keep,
        "value-weight": p.value_weight,
        "score": p.score,
        "smooth": p.smooth,
        "budget": p.budget,
    }
    return [text for name, x in made.items() for text in (f"--{name}", str(x))]


def main(
    arguments: Sequence[str] | None = None, program: str = "python -m lagkv_ext.commands.profile"
) -> int:
    """The command; 0, or 2 with a message where it was refused."""
    parser = _parser(program)
    options = parser.parse_args(arguments)
    try:
        if options.settings is not None:
            options = _with_settings(parser, arguments, options.settings)
        if options.dtype not in DTYPES:
            raise ProfileError(f"unknown dtype {options.dtype!r}; known: {', '.join(DTYPES)}")
        problem = Problem(
            heads=options.heads,
            tokens=options.tokens,
            key_dim=options.dim,
            value_dim=options.dim if options.value_dim is None else options.value_dim,
            dtype=DTYPES[options.dtype],
            batch=options.batch,
            start=options.sink_size,
            lag_size=options.lag_size,
            keep=resolve_keep(options.keep, options.keep_ratio, options.lag_size),
            value_weight=options.value_weight,
            score=options.score,
            smooth=options.smooth,
            budget=options.budget,
        )
        where = {"device": options.device, "threads": options.threads, "ragged": options.ragged}
        if options.once:
            run_once(problem, **where)
            return 0
        result = profile(problem, rounds=options.rounds, cold=options.cache == "cold", **where)
        print(result)
        if options.json:
            options.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
            print(f"results: {options.json}")
        if options.trace:
            write_trace(problem, options.trace, **where)
            print(f"trace: {options.trace} (open in Perfetto or chrome://tracing)")
        on_cuda = options.device.startswith("cuda")
        note = "" if on_cuda else " (on a machine with a GPU)"
        command = ncu_command(problem, options.device if on_cuda else "cuda", ragged=options.ragged)
        print(f"further{note}: {command}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


_METHOD = ("lag_size", "sink_size", "score", "value_weight", "smooth", "budget")


def _with_settings(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, path: Path
) -> argparse.Namespace:
    """The options once more, with what the settings file says of a compression as their defaults."""
    given = read_settings(path)
    defaults = {name: given[name] for name in _METHOD if name in given}
    parser.set_defaults(**defaults)
    options = parser.parse_args(arguments)
    if options.keep is None and options.keep_ratio is None:
        options.keep, options.keep_ratio = given.get("keep"), given.get("keep_ratio")
    left = [name for name in given if name not in (*defaults, "keep", "keep_ratio")]
    if left:
        print(f"{path}: {', '.join(left)} say nothing of a single compression, and are not used here")
    return options


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Time, bytes and GB/s of every stage of one compression, beside copying the cache.",
    )
    add = parser.add_argument
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=8, help="KV heads (default %(default)s)")
    add("--tokens", type=int, default=32768)
    add("--dim", type=int, default=128, help="head dim of keys, and of values unless --value-dim is given")
    add("--value-dim", type=int)
    add("--dtype", default="bfloat16", help=", ".join(DTYPES))
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=int, help="CPU threads; default torch's own choice")
    add("--sink-size", type=int, default=16)
    add("--lag-size", type=int, default=128)
    keeping = parser.add_mutually_exclusive_group()
    keeping.add_argument("--keep", type=int, help="tokens kept of each partition")
    keeping.add_argument("--keep-ratio", type=float, help=f"share kept (default {DEFAULT_KEEP_RATIO})")
    add("--value-weight", type=float, default=1.0)
    add("--score", default="std", help=", ".join(SCORES))
    add("--smooth", type=int, default=1, help="odd: mean over so many neighbours")
    add("--budget", default="partition", help=", ".join(BUDGETS))
    add(
        "--settings",
        type=Path,
        metavar="FILE",
        help="a lagkv.json, whose values hold where no option is given",
    )
    add(
        "--ragged",
        action="store_true",
        help="also the same sequences in slots, packed and in pages of 16 rows",
    )
    add("--rounds", type=int, default=21, help="turns of every stage (default %(default)s)")
    add("--cache", choices=("cold", "warm"), default="cold", help="of the processor or GPU, before every run")
    add("--trace", type=Path, metavar="FILE", help="also write a Chrome trace of three more turns")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add("--once", action="store_true", help="no timing: every stage once, for ncu and nsys to look at")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
