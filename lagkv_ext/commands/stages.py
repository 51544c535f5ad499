"""The stages of one compression as calls: what ``lagkv profile`` times, traces and shows to Nsight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lagkv_ext.commands.traffic import Problem

COPY = "copy"
BLOCK_SIZE = 16  #: rows of a page, as vLLM has them


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """One stage: ``run`` it after ``restore``, which undoes what an earlier run changed.

    ``operator``: whose `Problem.least_bytes` the stage moves. ``compressed``, of the stages that compress: turns a
    result of ``run`` into key, value and index as `compress` returns them.
    """

    name: str
    what: str
    operator: str
    run: Callable[[], Any]
    restore: Callable[[], None] = _nothing
    compressed: Callable[[Any], tuple[Tensor, Tensor, Tensor]] | None = None


def make_calls(p: Problem, device: torch.device, seed: int, *, ragged: bool = False) -> list[Call]:
    """Every stage of the dense operators, the copy last; with ``ragged`` also the ragged ones, before it."""
    pristine = p.make(device, seed)
    calls = _dense(p, *pristine)
    if ragged:
        calls += [_slots(p, *pristine), _packed(p, *pristine), _paged(p, *pristine)]
    copies = [torch.empty_like(x) for x in pristine]
    copy = Call(COPY, "key and value into existing buffers", "copy", lambda: _copy(copies, pristine))
    return [*calls, copy]


def needed_bytes(p: Problem, *, ragged: bool = False) -> int:
    """Memory that the tensors of `make_calls` and their results take."""
    dense = 3 * p.cache_bytes + 2 * p.output_bytes
    # Slots; packed rows and their results, as long; pages twice, the second time as they were.
    return dense + 5 * p.cache_bytes if ragged else dense


def _dense(p: Problem, *pristine: Tensor) -> list[Call]:
    lagkv = torch.ops.lagkv
    key, value = both = [x.clone() for x in pristine]
    run = (p.start, p.lag_size, p.keep)
    scores = lagkv.lag_score(key, value, p.start, p.lag_size, **p.scoring)
    rivals, places = (
        (scores, p.keep) if p.budget == "partition" else (scores.flatten(2), p.compressed * p.keep)
    )
    index: Tensor = lagkv.compress(key, value, *run, **p.method)[2]

    def bounds() -> Any:
        return [lagkv.partition_bounds(x, p.start, p.lag_size) for x in pristine]

    def score() -> Any:
        return lagkv.lag_score(*pristine, p.start, p.lag_size, **p.scoring)

    def compact() -> Any:
        return [lagkv.compact(x, index) for x in pristine]

    def compress() -> Any:
        return lagkv.compress(*pristine, *run, **p.method)

    def compress_() -> Any:
        return lagkv.compress_(key, value, *run, **p.method)

    def in_place(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return key[:, :, : p.rows], value[:, :, : p.rows], index

    return [
        Call("bounds", "partition_bounds of key and value", "partition_bounds", bounds),
        Call("score", "lag_score (bounds included)", "lag_score", score),
        Call("select", "topk_index", "topk_index", lambda: lagkv.topk_index(rivals, places)),
        Call("compact", "compact of key and value", "compact", compact),
        Call("compress", "everything, fused", "compress", compress, compressed=tuple),
        Call(
            "compress_",
            "everything, fused, in place",
            "compress_",
            compress_,
            lambda: _copy(both, pristine),
            in_place,
        ),
    ]


def _slots(p: Problem, *pristine: Tensor) -> Call:
    both = [x.clone() for x in pristine]
    start, length = _starts_and_lengths(p, pristine[0].device)

    def run() -> Any:
        return torch.ops.lagkv.compress_ragged_(*both, start, length, p.lag_size, p.keep, **p.method)

    def restore() -> None:
        _copy(both, pristine)
        start.fill_(p.start)
        length.fill_(p.tokens)

    def compressed(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return both[0][:, :, : p.rows], both[1][:, :, : p.rows], index[:, :, : p.rows]

    return Call(
        "compress_ragged_", "the same in slots, in place", "compress_ragged_", run, restore, compressed
    )


def _packed(p: Problem, *pristine: Tensor) -> Call:
    both = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in pristine]  # [B N, H, D]
    device = pristine[0].device
    ends = torch.arange(p.batch + 1, dtype=torch.int32, device=device) * p.tokens
    start, _ = _starts_and_lengths(p, device)

    def run() -> Any:
        return torch.ops.lagkv.compress_varlen(*both, ends, start, p.lag_size, p.keep, **p.method)

    def compressed(result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        key, value = (
            x[: p.batch * p.rows].unflatten(0, (p.batch, p.rows)).transpose(1, 2) for x in result[:2]
        )
        index = result[2][:, : p.batch * p.rows].unflatten(1, (p.batch, p.rows)).transpose(0, 1)
        return key, value, index

    return Call("compress_varlen", "the same, packed", "compress_varlen", run, compressed=compressed)


def _paged(p: Problem, *pristine: Tensor) -> Call:
    """Pages in an order drawn at random, as in an engine that has run for a while."""
    device = pristine[0].device
    per_sequence = -(-p.tokens // BLOCK_SIZE)
    order = torch.randperm(p.batch * per_sequence, generator=torch.Generator().manual_seed(0))
    table = order.to(device=device, dtype=torch.int32).view(p.batch, per_sequence)
    rows = torch.arange(p.tokens, device=device)
    before, both = [], []
    for x in pristine:
        pool = x.new_zeros(order.numel(), BLOCK_SIZE, p.heads, x.shape[-1])
        for b in range(p.batch):
            pool[table[b].long()[rows // BLOCK_SIZE], rows % BLOCK_SIZE] = x[b].transpose(0, 1)
        before.append(pool)
        both.append(pool.clone())
    start, length = _starts_and_lengths(p, device)

    def run() -> Any:
        return torch.ops.lagkv.compress_paged_(*both, table, start, length, p.lag_size, p.keep, **p.method)

    def restore() -> None:
        _copy(both, before)
        start.fill_(p.start)
        length.fill_(p.tokens)

    def compressed(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = (pool[table.long()].flatten(1, 2)[:, : p.rows].transpose(1, 2) for pool in both)
        return key, value, index[:, :, : p.rows]

    what = f"the same in scattered pages of {BLOCK_SIZE}, in place"
    return Call("compress_paged_", what, "compress_paged_", run, restore, compressed)


def _starts_and_lengths(p: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.full((p.batch,), p.start, dtype=torch.int32, device=device)
    return start, torch.full_like(start, p.tokens)


def _copy(to: Any, source: Any) -> None:
    for new, x in zip(to, source, strict=True):
        new.copy_(x)
