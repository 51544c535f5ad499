"""``python -m benchmarks.card --json OUT``: what is measured of a card in minutes, the most wanted first.

The file is written anew after every measurement, so that a run that is stopped keeps what it had. Everything is
verified before it is timed. ``python -m benchmarks.card_tables`` makes the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, options, run, verify
from benchmarks.fixed_cost import Layers
from lagkv_ext.commands import timing
from lagkv_ext.commands.stages import COPY, make_calls
from lagkv_ext.commands.traffic import Problem

SCHEMA = 1
SHAPES = ("llama-3.1-8b", "qwen2.5-7b", "gemma-3-270m")
DTYPES = ("bfloat16", "float32")
LENGTHS = (32768, 4096, 131072)
BESIDE_COPY = "compress_,compress,copy,clone"
BESIDE_PLAIN = "compress_,compress,copy,eager,compiled"
RAGGED = ("compress_", "compress_ragged_", "compress_varlen", "compress_paged_", COPY)
DECODE_PARTITIONS = 3  # of each layer: two to compress


class RedCheck(Exception):
    """A wrong result: no number is shown of it."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement; ``kind``: the list of the results that it belongs to."""

    name: str
    kind: str
    measure: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of all cases; ``tiny`` is for a rehearsal, whose numbers mean nothing."""

    device: str
    tiny: bool = False

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 25

    def tokens(self, tokens: int) -> int:
        return tokens // 64 if self.tiny else tokens

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def parts(size: Size) -> list[Part]:
    """Everything in order of worth: the ceiling, the operators beside copying, decode, pages, then plain PyTorch."""

    def case(shape: str, tokens: int, dtype: str, contenders: str, score: str = "std") -> Part:
        label = f"{shape} {cases.tokens_text(tokens)} {dtype} {score}"
        label += " beside plain PyTorch" if contenders == BESIDE_PLAIN else ""
        return Part(label, "cases", lambda: operators(size, shape, tokens, dtype, contenders, score))

    def ragged_part(batch: int, tokens: int, dtype: str) -> Part:
        label = f"ragged {batch} x {cases.tokens_text(tokens)} {dtype}"
        return Part(label, "ragged", lambda: ragged(size, batch, tokens, dtype))

    first = SHAPES[0]
    return [
        Part("copy bandwidth", "ceiling", lambda: ceiling(size)),
        *(case(first, tokens, dtype, BESIDE_COPY) for tokens in LENGTHS for dtype in DTYPES),
        *(Part(f"decode {dtype}", "decode", lambda dtype=dtype: decode(size, dtype)) for dtype in DTYPES),
        *(ragged_part(1, 32768, dtype) for dtype in DTYPES),
        Part(f"options {DTYPES[0]}", "options", lambda: with_options(size, DTYPES[0])),
        case(first, LENGTHS[0], DTYPES[0], BESIDE_PLAIN),
        *(case(first, LENGTHS[0], dtype, BESIDE_COPY, "cosine") for dtype in DTYPES),
        *(
            case(shape, tokens, dtype, BESIDE_COPY)
            for shape in SHAPES[1:]
            for tokens in LENGTHS
            for dtype in DTYPES
        ),
        ragged_part(16, 4096, DTYPES[0]),
        case(first, LENGTHS[0], DTYPES[1], BESIDE_PLAIN),
        *(
            case(shape, tokens, dtype, BESIDE_PLAIN)
            for shape in SHAPES
            for tokens in LENGTHS
            for dtype in DTYPES
            if (shape, tokens) != (first, LENGTHS[0])
        ),
    ]


def ceiling(size: Size) -> dict[str, Any]:
    """Measures a copy of memory that no cache holds, counting bytes read and written."""
    count = (8 << 20) if size.tiny else (4 << 30)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=size.device)
    target = torch.empty_like(source)
    measured = timing.measure(
        [timing.Candidate(COPY, lambda: target.copy_(source))], device=size.device, rounds=size.rounds
    )
    if not torch.equal(source, target):
        raise RedCheck("a copy differs from its source")
    seconds = measured.seconds(COPY)
    return {
        "bytes": 2 * count,
        "seconds": dataclasses.asdict(seconds),
        "gb_per_s": 2 * count / seconds.median / 1e9,
    }


def operators(
    size: Size, shape: str, tokens: int, dtype: str, contenders: str, score: str = "std"
) -> dict[str, Any]:
    """A case of ``benchmarks.run``."""
    if size.tiny:  # the compiler takes its time whatever the size
        contenders = contenders.replace(",compiled", "")
    made = [
        *("--device", size.device, "--shapes", shape, "--tokens", str(size.tokens(tokens)), "--dtype", dtype),
        *("--score", score, "--contenders", contenders, "--rounds", str(size.rounds), "--budget", "1"),
        *("--no-model-cuda", *(("--threads", "1") if size.device == "cpu" else ())),
    ]
    chosen = run.make_parser().parse_args(made)
    (case,) = run.make_cases(chosen)
    result = run.measure_case(case, chosen.contenders, chosen)
    red = [f"{name}: {check['difference']}" for name, check in result["checks"].items() if not check["green"]]
    if red:
        raise RedCheck("; ".join(red))
    return {"problem_name": f"{shape} {tokens} {dtype} {score}", **result}


def decode(size: Size, dtype: str) -> dict[str, Any]:
    """Every layer of a model compresses a few partitions, call by call and, on a card, in a captured graph."""
    shape = cases.SHAPES[SHAPES[0]]
    layers = 2 if size.tiny else shape.full_layers
    problem = Problem(
        heads=shape.heads,
        tokens=16 + DECODE_PARTITIONS * 128,
        key_dim=shape.dim,
        value_dim=shape.dim,
        dtype=cases.DTYPES[dtype],
    )
    every = Layers(problem, layers, device=size.device)
    check_layers(every)
    candidates = [
        timing.Candidate("compress_", every.operator, every.restore),
        timing.Candidate(COPY, every.copy, every.restore),
    ]
    if size.device == "cuda":
        for name, calls in (("compress_, graph", every.operator), ("copy, graph", every.copy)):
            candidates.append(timing.Candidate(name, captured(calls, every.restore), every.restore))
    measured = timing.measure(candidates, device=size.device, rounds=size.rounds)
    return {
        "dtype": dtype,
        "layers": layers,
        "partitions": DECODE_PARTITIONS,
        "bytes_per_layer": problem.cache_bytes,
        "host_us_per_call": host_seconds(size, every) * 1e6 / layers,
        "us_per_layer": {
            x.name: dataclasses.asdict(measured.seconds(x.name).scaled(1e6 / layers)) for x in candidates
        },
        "over_copy": dataclasses.asdict(measured.ratio("compress_", COPY)),
        "over_copy_graph": dataclasses.asdict(measured.ratio("compress_, graph", "copy, graph"))
        if size.device == "cuda"
        else None,
    }


def check_layers(every: Layers) -> None:
    p = every.problem
    every.restore()
    every.operator()
    expected = torch.ops.lagkv.compress(*every.pristine, p.start, p.lag_size, p.keep, **p.scoring)
    if wrong := verify.compressed_difference(*expected, p, *every.pristine):
        raise RedCheck(wrong)
    for cache in every.caches:
        if any(not torch.equal(x[:, :, : p.rows], y) for x, y in zip(cache, expected, strict=False)):
            raise RedCheck("a layer's cache is not what compress returns")


def captured(calls: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    """The calls as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        restore()
        calls()
    stream.synchronize()
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def host_seconds(size: Size, every: Layers) -> float:
    """Until the host has queued the calls of all layers: what a decoding step waits for without a graph."""
    best = float("inf")
    for _ in range(size.rounds):
        every.restore()
        size.synchronize()
        begin = time.perf_counter()
        every.operator()
        best = min(best, time.perf_counter() - begin)
    size.synchronize()
    return best


def ragged(size: Size, batch: int, tokens: int, dtype: str) -> dict[str, Any]:
    """The same sequences dense, in slots, packed and in scattered pages."""
    shape = cases.SHAPES[SHAPES[0]]
    problem = Problem(
        heads=shape.heads,
        tokens=size.tokens(tokens),
        key_dim=shape.dim,
        value_dim=shape.dim,
        dtype=cases.DTYPES[dtype],
        batch=min(batch, 2) if size.tiny else batch,
    )
    calls = [x for x in make_calls(problem, torch.device(size.device), 0, ragged=True) if x.name in RAGGED]
    pristine = problem.make(size.device, 0)
    for call in calls:
        if call.compressed is not None:
            call.restore()
            outcome = call.compressed(call.run())
            if wrong := verify.compressed_difference(*outcome, problem, *pristine):
                raise RedCheck(f"{call.name}: {wrong}")
    measured = timing.measure(
        [timing.Candidate(x.name, x.run, x.restore) for x in calls], device=size.device, rounds=size.rounds
    )
    return {
        "shape": shape.name,
        "batch": problem.batch,
        "tokens": problem.tokens,
        "dtype": dtype,
        "contenders": {
            x.name: {
                "seconds": dataclasses.asdict(measured.seconds(x.name)),
                "gb_per_s": problem.least_bytes(x.operator) / measured.seconds(x.name).median / 1e9,
                "over_copy": dataclasses.asdict(measured.ratio(x.name, COPY)),
            }
            for x in calls
        },
    }


def with_options(size: Size, dtype: str) -> dict[str, Any]:
    """The operators' options over the paper's method."""
    if wrong := options.wrong_choice(size.device):
        raise RedCheck(wrong)
    shape = cases.SHAPES[SHAPES[0]]
    problem = Problem(
        heads=shape.heads,
        tokens=size.tokens(32768),
        key_dim=shape.dim,
        value_dim=shape.dim,
        dtype=cases.DTYPES[dtype],
    )
    calls = options.measure(problem, size.device, size.rounds)
    return {"shape": shape.name, "tokens": problem.tokens, "dtype": dtype, "calls": calls}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all measured; 1: a red check or an error; 2: refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=cases.DEVICES, default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on tiny shapes")
    parser.add_argument("--only", metavar="TEXT", help="the measurements whose name contains this")
    parser.add_argument("--json", type=Path, metavar="OUT", required=True)
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    size = Size(chosen.device, chosen.tiny)
    todo = [part for part in parts(size) if chosen.only is None or chosen.only in part.name]
    if size.tiny and chosen.only is None:  # one of every kind
        todo = first_of_each(todo)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "commit": run.commit(),
        "machine": run.machine(chosen.device),
        "tiny": size.tiny,
        "not_measured": [part.name for part in todo],
        "failed": {},
        **{kind: [] for kind in ("ceiling", "cases", "decode", "ragged", "options")},
    }
    save(chosen.json, results)
    for part in todo:
        begin = time.monotonic()
        results["not_measured"].remove(part.name)
        try:
            with torch.no_grad():
                results[part.kind].append({"name": part.name, **part.measure()})
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            results["failed"][part.name] = f"{type(error).__name__}: {error}"
        save(chosen.json, results)
        verdict = results["failed"].get(part.name, "measured")
        print(f"{part.name}: {verdict} ({time.monotonic() - begin:.1f} s)", flush=True)
    return 1 if results["failed"] else 0


def first_of_each(todo: Sequence[Part]) -> list[Part]:
    seen: dict[tuple[str, bool], Part] = {}
    for part in todo:
        seen.setdefault((part.kind, "plain" in part.name), part)
    return list(seen.values())


def save(path: Path, results: dict[str, Any]) -> None:
    """In one step, so that whoever is killed leaves a whole file."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    raise SystemExit(main())
