"""The operators on CPU tensors, computed by the CUDA kernels in the executor.

Signatures as in ``lagkv_ext.reference``; arguments are not checked, which is the operators' part (csrc/checks.h).

``settings(...)`` changes, for a ``with`` block, what the planner believes of the device and how the executor runs;
``last()`` is the session of the latest operator call, with its counters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lagkv_ext import formulas
from tests import simt

RAGGED = ("compress_ragged_", "compress_varlen", "compress_paged_", "compress_blocks")

_device: dict[str, int] = {}
_session: dict[str, Any] = {}
_last: Any = None


@contextlib.contextmanager
def settings(*, device: dict[str, int] | None = None, **session: Any) -> Iterator[None]:
    """``device``: fields of the planner's ``Device``; the rest: arguments of ``simt.Session``."""
    global _device, _session
    before = _device, _session
    _device, _session = {**_device, **(device or {})}, {**_session, **session}
    try:
        yield
    finally:
        _device, _session = before


def last() -> Any:
    """The session of the latest call: ``counts()``, ``launches()``, ``unwritten()``."""
    return _last


def compress(key, value, start, lag_size, keep, **method) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _new_rows(key, value, start, lag_size, keep)
    if outputs[2].numel():
        _run("compress", key.dtype, (key, value, *outputs), _sizes(start, lag_size, keep, **method))
    return outputs


def compress_carried(
    key, value, carried, start, lag_size, keep, **method
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _new_rows(key, value, start, lag_size, keep)
    rows = carried.shape[2] + keep * formulas.compressed_count(key.shape[2], start, lag_size)
    new_carried = carried.new_empty((*carried.shape[:2], rows))
    sizes = _sizes(start, lag_size, keep, **method, budget="head")
    if outputs[2].numel() or new_carried.numel():
        _run("compress_carried", key.dtype, (key, value, carried, *outputs, new_carried), sizes)
    return *outputs, new_carried


def compress_(key, value, start, lag_size, keep, *, scores=None, sink_size=0, **method) -> Tensor:
    rows = formulas.output_length(key.shape[2], start, lag_size, keep)
    index = key.new_empty((*key.shape[:2], rows), dtype=torch.int32)
    if index.numel():
        sizes = _sizes(start, lag_size, keep, **method, sink_size=sink_size)
        _run("compress_", key.dtype, (key, value, _given(scores), index), sizes)
    return index


def lag_score(key, value, start, lag_size, **method) -> Tensor:
    count = formulas.compressed_count(key.shape[2], start, lag_size)
    result = key.new_empty((*key.shape[:2], count, lag_size), dtype=formulas.arithmetic_dtype(key.dtype))
    if result.numel():
        _run("lag_score", key.dtype, (key, value, result), _sizes(start, lag_size, lag_size, **method))
    return result


def partition_bounds(x, start, lag_size) -> Tensor:
    count = formulas.partition_count(x.shape[2], start, lag_size)
    bounds = x.new_empty((*x.shape[:2], count, 2, x.shape[3]), dtype=formulas.arithmetic_dtype(x.dtype))
    if bounds.numel():
        _run("partition_bounds", x.dtype, (x, bounds), start, lag_size)
    return bounds


def topk_index(score, keep) -> Tensor:
    index = score.new_empty((*score.shape[:-1], keep), dtype=torch.int32)
    if index.numel() and not _run("topk_index", score.dtype, (score, index), keep):
        _run("topk_index", score.dtype, (score.clone(memory_format=torch.contiguous_format), index), keep)
    return index


def compact(x, index) -> Tensor:
    out = x.new_empty((*index.shape, x.shape[3]))
    if out.numel():
        _run("compact", x.dtype, (x, index, out))
    return out


def compress_ragged_(
    key, value, start, length, lag_size, keep, *, scores=None, sink_size=0, **method
) -> Tensor:
    index = key.new_empty(key.shape[:3], dtype=torch.int32)
    tensors = (key, value, _given(scores), start, length, index)
    _run("compress_ragged_", key.dtype, tensors, _sizes(0, lag_size, keep, **method, sink_size=sink_size))
    return index


def compress_varlen(
    key, value, cu_seqlens, start, lag_size, keep, **method
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = (
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        key.new_empty((key.shape[1], key.shape[0]), dtype=torch.int32),
        cu_seqlens.new_empty(cu_seqlens.shape),
        start.new_empty(start.shape),
    )
    _run(
        "compress_varlen",
        key.dtype,
        (key, value, cu_seqlens, start, *outputs),
        _sizes(0, lag_size, keep, **method),
        partly=("new_key", "new_value"),
    )
    # Rows past those of all sequences are unspecified, and these kernels leave them alone.
    for name, x in (("new_key", outputs[0]), ("new_value", outputs[1])):
        written = torch.frombuffer(bytearray(last().written(name)) or bytearray(1), dtype=torch.uint8)
        rows = written[: x.numel()].view(x.shape).bool()
        total = int(outputs[3][-1])
        assert rows[:total].all(), f"compress_varlen left elements of {name} unwritten"
        assert not rows[total:].any(), f"compress_varlen wrote past the rows of {name}"
    return outputs


def compress_paged_(
    key_cache, value_cache, block_table, start, length, lag_size, keep, *, scores=None, sink_size=0, **method
) -> Tensor:
    batch, capacity = block_table.shape[0], block_table.shape[1] * key_cache.shape[1]
    index = key_cache.new_empty((batch, key_cache.shape[2], capacity), dtype=torch.int32)
    tensors = (key_cache, value_cache, _given(scores), block_table, start, length, index)
    sizes = _sizes(0, lag_size, keep, **method, sink_size=sink_size)
    _run("compress_paged_", key_cache.dtype, tensors, sizes)
    return index


def compress_blocks(
    key_cache,
    value_cache,
    source_table,
    target_table,
    m_before,
    m_after,
    sink_size,
    lag_size,
    keep,
    *,
    value_weight=1.0,
    score="std",
    smooth=1,
) -> Tensor:
    batch, capacity = target_table.shape[0], target_table.shape[1] * key_cache.shape[1]
    index = key_cache.new_empty((batch, key_cache.shape[2], capacity), dtype=torch.int32)
    tensors = (key_cache, value_cache, source_table, target_table, m_before, m_after, index)
    if index.numel():
        sizes = _sizes(sink_size, lag_size, keep, value_weight=value_weight, score=score, smooth=smooth)
        _run("compress_blocks", key_cache.dtype, tensors, sizes)
    return index


def _new_rows(key, value, start, lag_size, keep) -> tuple[Tensor, Tensor, Tensor]:
    rows = formulas.output_length(key.shape[2], start, lag_size, keep)
    return (
        key.new_empty((*key.shape[:2], rows, key.shape[3])),
        value.new_empty((*key.shape[:2], rows, value.shape[3])),
        key.new_empty((*key.shape[:2], rows), dtype=torch.int32),
    )


def _given(scores: Tensor | None) -> Tensor:
    """The bindings' way to say that there are none."""
    return torch.empty(0) if scores is None else scores


def _sizes(start, lag_size, keep, *, value_weight=1.0, **method) -> Any:
    return simt.module().Sizes(start, lag_size, keep, float(value_weight), **method)


def _run(
    operator: str, dtype: torch.dtype, tensors: tuple[Tensor, ...], *rest: Any, partly: tuple[str, ...] = ()
) -> Any:
    """One call of the bindings; every element of every output must have been written, but for those of ``partly``."""
    global _last
    module = simt.module()
    session = module.Session(**_session)
    family = "ragged_" if operator in RAGGED else "lagkv_"
    kernels = getattr(module, family + str(dtype).removeprefix("torch."))
    done = getattr(kernels, operator)(session, *map(simt.tensor, tensors), *rest, module.Device(**_device))
    _last = session
    if done is not False:
        unwritten = [item for item in session.unwritten() if item[0] not in partly]
        assert not unwritten, f"{operator} left elements of its outputs unwritten: {unwritten}"
    return done
