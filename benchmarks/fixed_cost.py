"""``python -m benchmarks.fixed_cost``: what one call of ``torch.ops.lagkv.compress_`` costs besides its bytes.

Two measurements. The fixed cost: tiny caches that stay in the processor's cache, over growing numbers of KV heads, to
which everything but the fixed cost of a call is proportional; a straight line through the times meets zero heads, and
so zero bytes, at the fixed cost, and the smallest call bounds it from above. The decode-time case: every layer of a
model compresses a few partitions of its cold cache, beside copying the same bytes.
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

import lagkv_ext
from benchmarks import cases
from benchmarks.run import Refused, commit, header, machine
from lagkv_ext.commands import timing
from lagkv_ext.commands.traffic import Problem

TARGET_US = 15.0
HEADS = (1, 2, 3, 4, 6, 8)
_TINY: dict[str, Any] = {
    "key_dim": 16,
    "value_dim": 16,
    "lag_size": 32,
    "keep": 8,
}  # 6 KB per head at 3 partitions of bfloat16
_CALLS = 64  # tiny ones per sample


@dataclasses.dataclass(frozen=True)
class Line:
    """Microseconds per call over heads: ``fixed + slope * heads``; ``residual``: the largest distance of a point."""

    fixed: float
    slope: float
    residual: float


def fit(points: dict[int, float]) -> Line:
    """Least squares over the relative error, so that the small sizes, which tell the fixed cost, count as much."""
    if len(points) < 2:
        raise ValueError(f"a line needs two points, got {len(points)}")
    weights = {x: 1 / y**2 for x, y in points.items()}
    total = sum(weights.values())
    mean_x = sum(weights[x] * x for x in points) / total
    mean_y = sum(weights[x] * y for x, y in points.items()) / total
    slope = sum(weights[x] * (x - mean_x) * (y - mean_y) for x, y in points.items()) / sum(
        weights[x] * (x - mean_x) ** 2 for x in points
    )
    fixed = mean_y - slope * mean_x
    return Line(fixed, slope, max(abs(fixed + slope * x - y) for x, y in points.items()))


class Layers:
    """The caches of some layers, and calls that treat every layer once (``repeat`` times)."""

    def __init__(self, problem: Problem, layers: int, repeat: int = 1, device: str = "cpu") -> None:
        self.problem = problem
        self.repeat = repeat
        self.pristine = problem.make(device)
        self.caches = [tuple(x.clone() for x in self.pristine) for _ in range(layers)] * repeat
        self.copies = [tuple(torch.empty_like(x) for x in self.pristine) for _ in range(layers)] * repeat

    def restore(self) -> None:
        for key, value in self.caches[: len(self.caches) // self.repeat]:
            key.copy_(self.pristine[0])
            value.copy_(self.pristine[1])

    def operator(self) -> None:
        p, call = self.problem, torch.ops.lagkv.compress_
        for key, value in self.caches:
            call(key, value, p.start, p.lag_size, p.keep)

    def function(self) -> None:
        p = self.problem
        for key, value in self.caches:
            lagkv_ext.compress_(key, value, lag_size=p.lag_size, keep=p.keep, sink_size=p.start)

    def copy(self) -> None:
        for (key, value), (new_key, new_value) in zip(self.caches, self.copies, strict=True):
            new_key.copy_(key)
            new_value.copy_(value)


def fixed_cost(
    dtype: torch.dtype, rounds: int, heads: Sequence[int] = HEADS, calls: int = _CALLS
) -> dict[str, Any]:
    """Microseconds per call on tiny caches, and the lines through their medians and through their best."""
    candidates = []
    for count in HEADS:
        layers = Layers(
            Problem(heads=count, tokens=16 + 3 * 32, dtype=dtype, **_TINY), layers=1, repeat=calls
        )
        timed: dict[str, Callable[[], None]] = {"operator": layers.operator, "function": layers.function}
        timed["copy"] = layers.copy
        candidates += [
            timing.Candidate(f"{name} {count}", call, layers.restore) for name, call in timed.items()
        ]
    measured = timing.measure(candidates, rounds=rounds, cold=False, least_rounds=rounds)
    result: dict[str, Any] = {}
    for name in ("operator", "function", "copy"):
        per_call = {count: measured.seconds(f"{name} {count}").scaled(1e6 / calls) for count in HEADS}
        result[name] = {
            "us_per_call": {str(count): dataclasses.asdict(x) for count, x in per_call.items()},
            "fit_of_medians": dataclasses.asdict(fit({count: x.median for count, x in per_call.items()})),
            # Anything else on the machine only ever adds time: the fit of the best is told too.
            "fit_of_best": dataclasses.asdict(fit({count: x.best for count, x in per_call.items()})),
        }
    return result


def decode_case(dtype: torch.dtype, partitions: int, layers: int, rounds: int) -> dict[str, Any]:
    """A Llama-shaped model's layers, each with a few partitions to look at, cold: per call, and over a copy."""
    problem = Problem(heads=8, tokens=16 + partitions * 128, key_dim=128, value_dim=128, dtype=dtype)
    all_layers = Layers(problem, layers)
    measured = timing.measure(
        [
            timing.Candidate("operator", all_layers.operator, all_layers.restore),
            timing.Candidate("copy", all_layers.copy, all_layers.restore),
        ],
        rounds=rounds,
    )
    return {
        "layers": layers,
        "partitions": partitions,
        "bytes_per_layer": problem.cache_bytes,
        "us_per_call": dataclasses.asdict(measured.seconds("operator").scaled(1e6 / layers)),
        "copy_us_per_call": dataclasses.asdict(measured.seconds("copy").scaled(1e6 / layers)),
        "over_copy": dataclasses.asdict(measured.ratio("operator", "copy")),
    }


def verdict(result: dict[str, Any]) -> str:
    """Tells whether the target is met. The bound decides where the fit is no line, as on a busy machine."""
    line = result["fit_of_medians"]
    smallest = min(x["median"] for x in result["us_per_call"].values())
    if line["fixed"] < 0 or line["residual"] > 0.25 * smallest:
        word = "met" if smallest <= TARGET_US else "not judged"
        return (
            f"no straight line (the machine is busy?); the smallest call bounds it: {smallest:.1f} us; {word}"
        )
    return f"{line['fixed']:.1f} us; {'met' if line['fixed'] <= TARGET_US else 'MISSED'}"


def lines(result: dict[str, Any]) -> list[str]:
    out = []
    what = {
        "operator": "torch.ops.lagkv.compress_",
        "function": "lagkv_ext.compress_",
        "copy": "copying the same cache (two calls)",
    }
    for name, x in result["fixed_cost"].items():
        points = [
            f"{n}: {p['median']:.1f} ({p['q1']:.1f} .. {p['q3']:.1f})" for n, p in x["us_per_call"].items()
        ]
        out.append(f"{what[name]}, microseconds per call by heads, median (quartiles): {', '.join(points)}")
        fits = [
            f"{x[key]['fixed']:.1f} + {x[key]['slope']:.2f} per head"
            for key in ("fit_of_medians", "fit_of_best")
        ]
        out.append(f"  line through the medians: {fits[0]}; through the best: {fits[1]}")
    out.append(
        f"fixed cost of a call, target at most {TARGET_US:.0f} us: {verdict(result['fixed_cost']['operator'])}"
    )
    d = result["decode"]
    call, copy, ratio = d["us_per_call"], d["copy_us_per_call"], d["over_copy"]
    out.append(
        f"decode: {d['layers']} layers of {d['partitions']} partitions, 8 heads, {d['bytes_per_layer'] / 1e6:.2f} MB "
        f"each, cold: {call['median']:.0f} us per call ({call['q1']:.0f} .. {call['q3']:.0f}), copying the same "
        f"{copy['median']:.0f} us: {ratio['median']:.2f}x ({ratio['q1']:.2f} .. {ratio['q3']:.2f})"
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 where the arguments are refused."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fixed_cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(cases.DTYPES))
    parser.add_argument(
        "--partitions", type=int, default=3, help="per layer in the decode case (default %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    try:
        dtype = cases.lookup("dtype", options.dtype, cases.DTYPES)
        if options.partitions < 2:
            raise Refused(
                f"--partitions must be at least 2 (fewer are not compressed), got {options.partitions}"
            )
        if min(options.layers, options.threads, options.rounds) < 1:
            raise Refused("--layers, --threads and --rounds must be at least 1")
        facts = {
            "machine": machine("cpu"),
            "settings": {"cache": "warm", "rounds": options.rounds},
            "commit": commit(),
        }
        print(f"{header(facts)[0]}; {options.dtype}, threads {options.threads}")
        torch.set_num_threads(options.threads)
        with torch.no_grad():
            result = {
                "fixed_cost": fixed_cost(dtype, options.rounds),
                "decode": decode_case(dtype, options.partitions, options.layers, options.rounds),
            }
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
