"""``python -m benchmarks.options``: time of the operators' options over that of the paper's method, in one process.

Each option takes its turn in every round on the same memory. A ratio is taken within each round; medians and quartiles
are shown. Three calls: a whole prompt in place, the same into new tensors, and the recursion's step, in which two new
partitions meet a cache that was compressed before. Before anything is timed, each option's choice is checked against
``lagkv_ext.reference`` in float64 on a shorter cache, where the two must agree in all but near-ties.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.run import Refused, commit, header, machine
from lagkv_ext import reference
from lagkv_ext.commands import timing
from lagkv_ext.commands.traffic import Problem

BASE = "std"
OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "std head": {"budget": "head"},
    "std smooth 3": {"smooth": 3},
    "cosine": {"score": "cosine"},
    "cosine head": {"score": "cosine", "budget": "head"},
    "blend": {"score": "blend"},
    "blend smooth 3 head": {"score": "blend", "smooth": 3, "budget": "head"},
}
SAME = 0.99  # of the kept rows, in float32 against float64


def same_choice(options: dict[str, Any], device: str = "cpu") -> float:
    """Share of the reference's kept rows that the operator keeps, too."""
    problem = Problem(heads=2, tokens=16 + 20 * 128, key_dim=64, value_dim=64)
    key, value = problem.make()
    run = (problem.start, problem.lag_size, problem.keep)
    index = torch.ops.lagkv.compress(key.to(device), value.to(device), *run, **options)[2].cpu()
    exact = reference.compress(key.double(), value.double(), *run, **options)[2]
    kept = torch.zeros(1, problem.heads, problem.tokens, dtype=torch.bool)
    return kept.scatter(2, exact.long(), True).gather(2, index.long()).float().mean().item()


def whole_prompts(problem: Problem, device: str) -> dict[str, list[timing.Candidate]]:
    pristine = problem.make(device)
    key, value = (x.clone() for x in pristine)
    run = (problem.start, problem.lag_size, problem.keep)

    def restore() -> None:
        key.copy_(pristine[0])
        value.copy_(pristine[1])

    def in_place(options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: torch.ops.lagkv.compress_(key, value, *run, **options)

    def into_new(options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: torch.ops.lagkv.compress(*pristine, *run, **options)

    return {
        "in place": [timing.Candidate(name, in_place(x), restore) for name, x in OPTIONS.items()],
        "into new tensors": [timing.Candidate(name, into_new(x)) for name, x in OPTIONS.items()],
    }


def recursion(problem: Problem, device: str) -> list[timing.Candidate]:
    """A cache of as many tokens, compressed before, and two new partitions; with a head's budget scores are carried."""
    sink, lag_size, keep = problem.start, problem.lag_size, problem.keep
    before = keep * problem.compressed
    rows = sink + before + 2 * lag_size
    pristine = dataclasses.replace(problem, tokens=rows).make(device)
    key, value = (x.clone() for x in pristine)
    bound = torch.rand(problem.batch, problem.heads, rows, device=device)
    scores = bound.clone()

    def restore() -> None:
        for x, old in zip((key, value, scores), (*pristine, bound), strict=True):
            x.copy_(old)

    def step(options: dict[str, Any]) -> Callable[[], Any]:
        carried = {"scores": scores, "sink_size": sink} if "budget" in options else {}
        return lambda: torch.ops.lagkv.compress_(
            key, value, sink + before, lag_size, keep, **options, **carried
        )

    return [timing.Candidate(name, step(options), restore) for name, options in OPTIONS.items()]


def measured(candidates: list[timing.Candidate], device: str, rounds: int) -> dict[str, Any]:
    found = timing.measure(candidates, device=device, rounds=rounds, budget_s=60)
    return {
        x.name: {
            "ms": dataclasses.asdict(found.seconds(x.name).scaled(1e3)),
            "over_base": dataclasses.asdict(found.ratio(x.name, BASE)),
        }
        for x in candidates
    }


def measure(problem: Problem, device: str, rounds: int) -> dict[str, Any]:
    """Every call with every option: milliseconds, and the ratio to the paper's method."""
    calls = {**whole_prompts(problem, device), "a step of the recursion": recursion(problem, device)}
    return {call: measured(candidates, device, rounds) for call, candidates in calls.items()}


def wrong_choice(device: str) -> str | None:
    """The first option whose choice is not the reference's, and how much of it is kept."""
    for name, choice in OPTIONS.items():
        if (same := same_choice(choice, device)) < SAME:
            return f"{name} keeps {same:.1%} of the reference's rows"
    return None


def lines(result: dict[str, Any]) -> list[str]:
    out = []
    for call, options in result.items():
        out.append(f"{call}: milliseconds and ratio to {BASE}, medians (quartiles)")
        for name, x in options.items():
            ms, ratio = x["ms"], x["over_base"]
            out.append(
                f"  {name:20} {ms['median']:8.2f} ({ms['q1']:.2f} .. {ms['q3']:.2f})   "
                f"{ratio['median']:.2f} ({ratio['q1']:.2f} .. {ratio['q3']:.2f})"
            )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where a choice is wrong, or 2 where the arguments are refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=cases.DEVICES, default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(cases.DTYPES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    try:
        dtype = cases.lookup("dtype", options.dtype, cases.DTYPES)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise Refused("--device cuda: torch sees no CUDA device")
        if min(options.tokens, options.heads, options.threads, options.rounds) < 1:
            raise Refused("--tokens, --heads, --threads and --rounds must be at least 1")
        facts = {
            "machine": machine(options.device),
            "settings": {"cache": "cold", "rounds": options.rounds},
            "commit": commit(),
        }
        print(f"{header(facts)[0]}; {options.dtype}, {options.tokens} tokens, threads {options.threads}")
        if wrong := wrong_choice(options.device):
            print(f"error: {wrong}", file=sys.stderr)
            return 1
        torch.set_num_threads(options.threads)
        problem = Problem(heads=options.heads, tokens=options.tokens, key_dim=128, value_dim=128, dtype=dtype)
        with torch.no_grad():
            result = measure(problem, options.device, options.rounds)
    except (Refused, cases.UnknownName) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    print("\n".join(lines(result)))
    if options.json:
        options.json.write_text(json.dumps({**facts, **result}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
