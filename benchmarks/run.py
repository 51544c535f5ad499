"""``python -m benchmarks.run``: verify, then time, then report.

Every contender works on the same buffers in one process, takes its turn in every round, and is timed only if its result
was found right just before. See ``--help``; ``benchmarks/cases.py`` has the shapes, ``baselines.py`` the contenders.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lagkv_ext
from benchmarks import baselines, cases, modelled, report, verify
from lagkv_ext.arguments import SCORES
from lagkv_ext.commands import timing
from lagkv_ext.commands.traffic import Problem

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = (
    "compress_",
    "compress",
    "copy",
    "clone",
    "compress_-avx2",
    "compress_-portable",
    "compiled",
    "compiled-topk",
    "eager",
    "kvpress",
)


class Refused(ValueError):
    """Arguments that make no benchmark; the message says which, and what there is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, all green; 1: a red check or a regression; 2: refused."""
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    options.arguments = shown_arguments(arguments)
    try:
        if options.compare:
            return compare(options)
        return run(options)
    except (Refused, report.ResultsError, cases.UnknownName) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def shown_arguments(arguments: Sequence[str]) -> list[str]:
    """For result files: which interpreter has kvpress, and where results go, is no matter of the reader's."""
    words = list(arguments)
    for option in ("--kvpress-python", "--json"):
        if option in words[:-1]:
            at = words.index(option) + 1
            words[at] = Path(words[at]).name
    return words


def compare(options: argparse.Namespace) -> int:
    paths = [Path(path) for path in options.compare]
    contents = [report.load(path) for path in paths]
    print("\n".join(report.comparison(*contents)))
    if options.plot:
        report.plot([(letter, x) for letter, x in zip("AB", contents, strict=True)], options.plot)
        print(f"picture: {options.plot}")
    return 0


def run(options: argparse.Namespace) -> int:
    old = report.load(options.against) if options.against else None
    todo = make_cases(options)
    names = [cases.lookup("contender", name, dict.fromkeys(CONTENDERS, name)) for name in options.contenders]
    refuse_too_large(todo)
    results: dict[str, Any] = {
        "schema": report.SCHEMA,
        "command": "python -m benchmarks.run " + shlex.join(options.arguments),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(options.device),
        "settings": {
            "cache": options.cache,
            "rounds": options.rounds,
            "budget_s": options.budget,
            "seed": options.seed,
        },
        "cases": [],
    }
    print("\n".join(header(results)), flush=True)
    for case in todo:
        need, free = case.need_bytes(), timing.available_bytes(case.device)
        print(f"\n{case.name}", flush=True)
        print(
            f"  cache {gigabytes(case.problem.cache_bytes)}, buffers {gigabytes(need)}, free {gigabytes(free)}",
            flush=True,
        )
        results["cases"].append(measure_case(case, names, options))
        print("\n".join(report.case_lines(results["cases"][-1])), flush=True)
    results["load_after"] = os.getloadavg()[0]
    if lines := report.linearity_lines(results["cases"]):
        print("\n" + "\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"results: {options.json}")
    if options.plot and any(case["contenders"] for case in results["cases"]):
        report.plot([("", results)], options.plot)
        print(f"picture: {options.plot}")
    failed = sum(not check["green"] for case in results["cases"] for check in case["checks"].values())
    if failed:
        print(f"\n{failed} red {'check' if failed == 1 else 'checks'}: see above", file=sys.stderr)
    if old is not None:
        lines, bad = report.regressions(results, old, options.tolerance)
        print("\n" + "\n".join([f"against {options.against}:", *lines]))
        if bad:
            print("\n".join(["REGRESSION", *bad]), file=sys.stderr)
            return 1
    return 1 if failed else 0


def measure_case(case: cases.Case, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Verify and time one case; the dictionary is what the JSON file holds of it."""
    problem = {k: v for k, v in dataclasses.asdict(case.problem).items() if k != "dtype"}
    result: dict[str, Any] = {
        "name": case.name,
        "shape": case.shape.name,
        "device": case.device,
        "threads": case.threads,
        "problem": {**problem, "dtype": case.dtype, "rows": case.problem.rows},
        "cache_bytes": case.problem.cache_bytes,
        "checks": {},
        "skipped": {},
        "contenders": {},
        "ratios": {},
    }
    torch.compiler.reset()  # what earlier cases compiled counts against the limit of recompilations
    before = torch.get_num_threads()
    if case.threads:
        torch.set_num_threads(case.threads)
    entered: list[baselines.Contender] = []
    try:
        buffers = baselines.Buffers(case, options.seed)
        available = baselines.contenders(case, kvpress_python=options.kvpress_python)
        for name in names:
            try:
                check_memory(name, case)
                contender = available[name]()
            except baselines.Skipped as reason:
                result["skipped"][name] = str(reason)
                continue
            check = verify.verify(contender, buffers)
            result["checks"][name] = {
                "green": check.green,
                "difference": check.difference,
                "note": check.note,
            }
            if check.green:
                entered.append(contender)
            else:
                contender.close()
        if entered:
            time_case(case, entered, buffers, options, result)
        if case.device == "cpu" and not torch.cuda.is_available() and options.model_cuda is not False:
            print("  cuda: bringing the executor up to date and counting its traffic", flush=True)
            result["modelled"] = modelled.traffic(case.problem, build=options.model_cuda is True)
    finally:
        for contender in entered:
            contender.close()
        torch.set_num_threads(before)
    return result


def time_case(
    case: cases.Case,
    entered: Sequence[baselines.Contender],
    buffers: baselines.Buffers,
    options: argparse.Namespace,
    result: dict[str, Any],
) -> None:
    def bound(run: Callable[[baselines.Buffers], Any]) -> Callable[[], Any]:
        return lambda: run(buffers)

    candidates = [
        timing.Candidate(x.name, bound(x.run), buffers.restore, times_itself=x.times_itself) for x in entered
    ]
    with torch.no_grad():
        measured = timing.measure(
            candidates,
            device=case.device,
            rounds=options.rounds,
            cold=options.cache == "cold",
            budget_s=options.budget,
            seed=options.seed,
        )
    for contender in entered:
        seconds = measured.seconds(contender.name)
        least = case.problem.least_bytes(contender.moves)
        share = None
        if "copy" in measured.rounds:
            share = least / case.problem.least_bytes("copy") * measured.ratio("copy", contender.name).median
        result["contenders"][contender.name] = {
            "what": contender.what,
            "seconds": dataclasses.asdict(seconds),
            "least_bytes": least,
            "gb_per_s": least / seconds.median / 1e9,
            "copy_share": share,
        }
    for pair in report.RATIOS:
        if all(name in measured.rounds for name in pair):
            best = [measured.seconds(name).best for name in pair]
            result["ratios"][report.ratio_name(pair)] = {
                **dataclasses.asdict(measured.ratio(*pair)),
                "of_best": best[0] / best[1],
            }


def check_memory(name: str, case: cases.Case) -> None:
    """Skipped where a contender's temporaries would not fit beside what is already there."""
    if name not in ("eager", "compiled", "compiled-topk", "kvpress"):
        return
    need = case.eager_bytes() + (2 * case.problem.cache_bytes if name == "kvpress" else 0)
    free = timing.available_bytes(case.device)
    if need > 0.9 * free:
        raise baselines.Skipped(f"needs about {gigabytes(need)} for temporaries, {gigabytes(free)} are free")


def refuse_too_large(todo: Sequence[cases.Case]) -> None:
    """Refused before anything is allocated. Checks work on blocks of partitions and take little beside the buffers."""
    for case in todo:
        need, free = case.need_bytes(), timing.available_bytes(case.device)
        if need > 0.9 * free:
            raise Refused(
                f"{case.name} needs {gigabytes(need)} on {case.device} and {gigabytes(free)} are free: "
                "choose fewer --tokens, a smaller --batch or a narrower --dtype"
            )


def make_cases(options: argparse.Namespace) -> list[cases.Case]:
    """All combinations of the options, refused where one of them cannot be."""
    cases.lookup("device", options.device, dict.fromkeys(cases.DEVICES))
    shapes = [cases.lookup("shape", name, cases.SHAPES) for name in options.shapes]
    dtypes = [cases.lookup("dtype", name, cases.DTYPES) for name in options.dtype]
    cases.lookup("score", options.score, dict.fromkeys(SCORES))
    if options.device == "cuda":
        if not torch.cuda.is_available():
            why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            raise Refused(f"--device cuda: {why}")
        if lagkv_ext.info()["cuda_kernels"] != "loaded":
            raise Refused(f"--device cuda: the CUDA kernels are {lagkv_ext.info()['cuda_kernels']}")
        threads = [0]
    else:
        threads = options.threads or sorted({1, torch.get_num_threads()})
        cores = os.cpu_count() or 1
        for count in threads:
            if not 1 <= count <= cores:
                raise Refused(f"--threads must be between 1 and {cores} here, got {count}")
    made = []
    try:
        keep = lagkv_ext.keep_count(options.keep_ratio, options.lag_size)
        for shape in shapes:
            for dtype in dtypes:
                for tokens in options.tokens:
                    problem = Problem(
                        heads=shape.heads,
                        tokens=tokens,
                        key_dim=shape.dim,
                        value_dim=shape.dim,
                        dtype=dtype,
                        batch=options.batch,
                        start=options.sink_size,
                        lag_size=options.lag_size,
                        keep=keep,
                        score=options.score,
                    )
                    made += [cases.Case(shape, problem, options.device, count) for count in threads]
    except ValueError as error:
        raise Refused(str(error)) from error
    return made


def machine(device: str) -> dict[str, Any]:
    """Describes the machine, for a reader of the numbers."""
    facts = lagkv_ext.info()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "last_level_cache_bytes": timing.cache_bytes(device),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lagkv_ext": facts["lagkv_ext"],
        "cpu_isa": facts["cpu_isa"],
        "cuda_kernels": facts["cuda_kernels"],
        "compiler": facts["build"]["compiler"],
        "load_before": os.getloadavg()[0],
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def commit() -> str | None:
    """The commit that is checked out, with "+" where tracked files but results were changed; None outside of git."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for args in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def header(results: dict[str, Any]) -> list[str]:
    m, s = results["machine"], results["settings"]
    where = m["gpu"] or f"{m['processor']}, {m['cores']} cores, {m['cpu_isa']}"
    lines = [
        f"{where}; torch {m['torch']}, lagkv_ext {m['lagkv_ext']} at {results['commit'] or 'an unknown commit'}",
        f"caches {s['cache']} before every run, up to {s['rounds']} turns each; GB/s: least bytes over the median "
        "time; ratios: median of the ratios within each round (quartiles)",
    ]
    if m["load_before"] > 0.5 and m["gpu"] is None:
        lines.append(
            f"the machine is busy (load {m['load_before']:.1f} on {m['cores']} cores): the spread shows it"
        )
    return lines


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


def make_parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    def tokens(text: str) -> list[int]:
        try:
            return [cases.parse_tokens(part) for part in names(text)]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def counts(text: str) -> list[int]:
        if not all(part.isdigit() for part in names(text)):
            raise argparse.ArgumentTypeError(f"numbers with commas between, got {text!r}")
        return [int(part) for part in names(text)]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Verify, then time, then report: LagKV's operators against copying the same cache, the reference "
        "eager and compiled, and kvpress.",
        epilog="shapes: " + ", ".join(cases.SHAPES),
    )
    add = parser.add_argument
    add("--device", default="cpu", help=", ".join(cases.DEVICES))
    add(
        "--dtype",
        type=names,
        default=["bfloat16", "float32"],
        help=f"of {', '.join(cases.DTYPES)}; commas between",
    )
    add("--shapes", type=names, default=["llama-3.1-8b"], help="named below; commas between")
    add("--tokens", type=tokens, default=[32768], help="as 4k,32k,128k")
    add("--threads", type=counts, default=None, help="CPU threads, as 1,2; default 1 and torch's own choice")
    add("--keep-ratio", type=float, default=0.25, help="share kept of each partition (default %(default)s)")
    add("--lag-size", type=int, default=128)
    add("--sink-size", type=int, default=16)
    add("--batch", type=int, default=1)
    add("--score", default="std", help=", ".join(SCORES))
    add("--contenders", type=names, default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    add("--kvpress-python", metavar="PATH", help="an interpreter that has kvpress, if this one has not")
    add("--cache", choices=("cold", "warm"), default="cold", help="of every contender, before every run")
    add("--rounds", type=int, default=15, help="turns of every contender (default %(default)s)")
    add(
        "--budget",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="after which a slow contender takes no more turns",
    )
    add("--seed", type=int, default=0)
    add(
        "--model-cuda",
        action=argparse.BooleanOptionalAction,
        help="without a GPU: CUDA traffic as the SIMT executor counts it, built if need be (default: if it is built)",
    )
    add("--json", type=Path, metavar="OUT", help="write all results to this file")
    add("--plot", type=Path, metavar="PNG", help="lines over several lengths, else bars")
    add("--against", type=Path, metavar="FILE", help="older results: exit 1 where a guarded ratio grew")
    add("--tolerance", type=float, default=0.1, help="by more than this share (default %(default)s)")
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing: show two result files beside each other",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
