"""Is a contender's result right? Asked before it is timed: a number never appears beside a red check.

Rows must be bit for bit the input's at the index; the index must have the sink, ``keep`` ascending positions of every
partition and the window; and no token may be left out whose score, by the reference in float64, is higher than a kept
one's by more than twice what plain PyTorch in the operator's arithmetic is off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines import Buffers, Contender, KvpressWorker
from lagkv_ext import formulas, reference
from lagkv_ext.commands.traffic import Problem

_BLOCK = 32  # partitions scored at a time: float64 copies of a whole long cache would not fit
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Check:
    """``difference`` is empty where the check is green; ``note`` is what a reader should know of a green one."""

    difference: str = ""
    note: str = ""

    @property
    def green(self) -> bool:
        return not self.difference


def verify(contender: Contender, buffers: Buffers) -> Check:
    """Run the contender once on restored buffers and check what it returns."""
    buffers.restore()
    p = buffers.problem
    if contender.check == "kvpress":
        assert KvpressWorker.last is not None
        return _kvpress_check(*KvpressWorker.last.result(), p, buffers)
    result = contender.run(buffers)
    if contender.check == "copied":
        key, value = result
        wrong = _bits_difference("key", key, buffers.pristine_key) or _bits_difference(
            "value", value, buffers.pristine_value
        )
        return Check(wrong)
    key, value, index = result
    return Check(compressed_difference(key, value, index, p, buffers.pristine_key, buffers.pristine_value))


def compressed_difference(
    key: Tensor, value: Tensor, index: Tensor, p: Problem, old_key: Tensor, old_value: Tensor
) -> str:
    """Describes what is wrong with a result of ``compress``; empty where nothing is."""
    if wrong := index_difference(index, p):
        return wrong
    rows = index.long()
    for name, new, old in (("key", key, old_key), ("value", value, old_value)):
        if new.shape != (*index.shape, old.shape[3]):
            return f"{name} has shape {list(new.shape)}, not {[*index.shape, old.shape[3]]}"
        for head in range(p.heads):
            expected = _bits(old[:, head]).gather(1, rows[:, head, :, None].expand(-1, -1, old.shape[3]))
            if wrong := _bits_difference(f"{name} of head {head}", _bits(new[:, head]), expected):
                return wrong
    return selection_difference(index, p, old_key, old_value)


def index_difference(index: Tensor, p: Problem) -> str:
    """Everything about an index that does not depend on scores."""
    shape = [p.batch, p.heads, p.rows]
    if index.dtype != torch.int32 or list(index.shape) != shape:
        return f"index is {index.dtype} {list(index.shape)}, not torch.int32 {shape}"
    index = index.long()
    if p.compressed == 0:
        return (
            ""
            if (index == torch.arange(p.tokens, device=index.device)).all()
            else "index is not the identity"
        )
    window = p.start + p.compressed * p.lag_size
    sink, inner, tail = index.split([p.start, p.compressed * p.keep, p.tokens - window], dim=2)
    for name, part, first in (("the sink", sink, 0), ("the window", tail, window)):
        bad = part != torch.arange(first, first + part.shape[2], device=index.device)
        if bad.any():
            return f"{name} is not whole: {int(bad.sum())} of its {bad.numel()} positions differ"
    inner = inner.unflatten(2, (p.compressed, p.keep)) - p.start
    inner = inner - p.lag_size * torch.arange(p.compressed, device=index.device)[:, None]
    bad = (inner < 0) | (inner >= p.lag_size)
    if bad.any():
        return f"{int(bad.sum())} of {bad.numel()} kept positions are not in their partition, first at {_first(bad)}"
    bad = inner.diff(dim=-1) <= 0
    return f"index does not ascend at {_first(bad)}" if bad.any() else ""


def selection_difference(index: Tensor, p: Problem, key: Tensor, value: Tensor) -> str:
    """Tokens left out that score higher than kept ones, beyond rounding."""
    inner = index[:, :, p.start : p.start + p.compressed * p.keep].long() - p.start
    worst_gap, allowed, bad_partitions = 0.0, 0.0, 0
    for first in range(0, p.compressed, _BLOCK):
        count = min(_BLOCK, p.compressed - first)
        rows = slice(p.start + first * p.lag_size, p.start + (first + count + 1) * p.lag_size)
        exact, tolerance = _scores(key[:, :, rows], value[:, :, rows], p)
        kept = (
            inner[:, :, first * p.keep : (first + count) * p.keep].unflatten(2, (count, p.keep)) % p.lag_size
        )
        mask = torch.zeros_like(exact, dtype=torch.bool).scatter_(3, kept, True)
        worst_kept = exact.masked_fill(~mask, math.inf).amin(-1)
        gap = exact.masked_fill(mask, -math.inf).amax(-1) - worst_kept
        bad = gap > 2 * tolerance
        bad_partitions += int(bad.sum())
        if bad.any() and float(gap[bad].max()) > worst_gap:
            worst_gap, allowed = float(gap[bad].max()), float(2 * tolerance[bad].max())
    if not bad_partitions:
        return ""
    return (
        f"in {bad_partitions} of {p.batch * p.heads * p.compressed} partitions a token was left out that scores higher "
        f"than a kept one, by up to {worst_gap:.3g} (rounding allows {allowed:.3g})"
    )


def _scores(key: Tensor, value: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, P-1, L]`` in float64, and per partition how far rounding may move one."""
    exact = reference.lag_score(key.double(), value.double(), 0, p.lag_size, **p.scoring)
    if key.dtype == torch.float64:  # the same sums in another order
        plain = reference.lag_score(key.flip(-1), value.flip(-1), 0, p.lag_size, **p.scoring)
    else:
        plain = reference.lag_score(key, value, 0, p.lag_size, **p.scoring).double()
    eps = torch.finfo(formulas.arithmetic_dtype(key.dtype)).eps
    return exact, 2 * (plain - exact).abs().amax(-1) + 4 * eps * exact.abs().amax(-1)


def _kvpress_check(index: Tensor, key: Tensor, p: Problem, buffers: Buffers) -> Check:
    """kvpress scores in the storage type and orders rows by score; its choice is only judged where that is float32."""
    order = index.sort(dim=-1)
    ascending = order.values.to(buffers.key.device)
    if wrong := index_difference(ascending.int(), p):
        return Check(wrong)
    key = key.gather(2, order.indices[..., None].expand_as(key)).to(buffers.key.device)
    expected = buffers.pristine_key.gather(2, ascending[..., None].expand(-1, -1, -1, p.key_dim))
    if wrong := _bits_difference("key", key, expected):
        return Check(wrong)
    ours = torch.ops.lagkv.compress(buffers.key, buffers.value, p.start, p.lag_size, p.keep, **p.scoring)[2]
    chosen = torch.zeros(p.batch, p.heads, p.tokens, dtype=torch.bool, device=index.device)
    chosen = chosen.scatter(2, ours.long().to(index.device), True)
    same = int(chosen.gather(2, index).sum())
    note = f"{same} of {index.numel()} positions are the operators' own"
    if p.dtype in (torch.float32, torch.float64):
        return Check(
            selection_difference(ascending.int(), p, buffers.pristine_key, buffers.pristine_value), note
        )
    return Check(note=note + f"; it scores in {str(p.dtype).removeprefix('torch.')}")


def _bits(x: Tensor) -> Tensor:
    return x.view(_INTEGER[x.element_size()])


def _bits_difference(name: str, actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape:
        return f"{name} has shape {list(actual.shape)}, not {list(expected.shape)}"
    if torch.equal(_bits(actual), _bits(expected)):
        return ""
    bad = _bits(actual) != _bits(expected)
    return f"{name}: {int(bad.sum())} of {bad.numel()} elements differ from the input's rows, first at {_first(bad)}"


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
