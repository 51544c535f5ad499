"""Fake kernels: shapes and dtypes of results, for tracing, where no kernel runs.

They refuse what their results depend on: ranks, dtypes, devices, lag_size, keep, start. All else is refused by the
kernels (csrc/checks.h), when the graph runs. Lengths stay symbolic, so that one graph serves every length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext import _library, arguments, formulas

assert _library  # loading the libraries defines torch.ops.lagkv


@torch.library.register_fake("lagkv::compress")
def _(key, value, start, lag_size, keep, *, value_weight=1.0, score="std", smooth=1, budget="partition"):
    return _compressed("compress", key, value, start, lag_size, keep)


@torch.library.register_fake("lagkv::compress_carried")
def _(key, value, carried, start, lag_size, keep, *, value_weight=1.0, score="std", smooth=1):
    op = "compress_carried"
    result = _compressed(op, key, value, start, lag_size, keep)
    _check_rank(op, "carried", carried, "[B, H, C]")
    _check_score_dtype(op, "carried", carried, key=key)
    _check_devices(op, key=key, carried=carried)
    rows = carried.shape[2] + keep * formulas.compressed_count(key.shape[2], start, lag_size)
    return *result, carried.new_empty((*key.shape[:2], rows))


def _compressed(op, key, value, start, lag_size, keep):
    _check_rows(op, "[B, H, N, D]", key=key, value=value)
    batch, heads, length, key_dim = key.shape
    rows = formulas.output_length(length, start, lag_size, keep)
    return (
        key.new_empty((batch, heads, rows, key_dim)),
        value.new_empty((batch, heads, rows, value.shape[3])),
        key.new_empty((batch, heads, rows), dtype=torch.int32),
    )


@torch.library.register_fake("lagkv::compress_")
def _(
    key,
    value,
    start,
    lag_size,
    keep,
    *,
    value_weight=1.0,
    score="std",
    smooth=1,
    budget="partition",
    scores=None,
    sink_size=0,
):
    _check_rows("compress_", "[B, H, N, D]", key=key, value=value)
    _check_scores_device("compress_", scores, key=key)
    batch, heads, length, _ = key.shape
    rows = formulas.output_length(length, start, lag_size, keep)
    return key.new_empty((batch, heads, rows), dtype=torch.int32)


@torch.library.register_fake("lagkv::partition_bounds")
def _(x, start, lag_size):
    _check_rows("partition_bounds", "[B, H, N, D]", x=x)
    batch, heads, length, dim = x.shape
    count = formulas.partition_count(length, start, lag_size)
    return x.new_empty((batch, heads, count, 2, dim), dtype=formulas.arithmetic_dtype(x.dtype))


@torch.library.register_fake("lagkv::lag_score")
def _(key, value, start, lag_size, *, value_weight=1.0, score="std", smooth=1):
    _check_rows("lag_score", "[B, H, N, D]", key=key, value=value)
    batch, heads, length, _ = key.shape
    count = formulas.compressed_count(length, start, lag_size)
    return key.new_empty((batch, heads, count, lag_size), dtype=formulas.arithmetic_dtype(key.dtype))


@torch.library.register_fake("lagkv::topk_index")
def _(score, keep):
    if score.dim() < 1:
        _refuse("topk_index", "score must have at least 1 dimension [..., L], got a scalar")
    keep = arguments.integer("keep", keep, minimum=1)
    return score.new_empty((*score.shape[:-1], keep), dtype=torch.int32)


@torch.library.register_fake("lagkv::compact")
def _(x, index):
    _check_rows("compact", "[B, H, N, D]", x=x)
    _check_rank("compact", "index", index, "[B, H, K]")
    _check_devices("compact", x=x, index=index)
    return x.new_empty((*index.shape, x.shape[3]))


@torch.library.register_fake("lagkv::compress_ragged_")
def _(
    key,
    value,
    start,
    length,
    lag_size,
    keep,
    *,
    value_weight=1.0,
    score="std",
    smooth=1,
    budget="partition",
    scores=None,
    sink_size=0,
):
    _check_rows("compress_ragged_", "[B, H, capacity, D]", key=key, value=value)
    _check_devices("compress_ragged_", key=key, start=start, length=length)
    _check_scores_device("compress_ragged_", scores, key=key)
    return key.new_empty(key.shape[:3], dtype=torch.int32)


@torch.library.register_fake("lagkv::compress_varlen")
def _(
    key,
    value,
    cu_seqlens,
    start,
    lag_size,
    keep,
    *,
    value_weight=1.0,
    score="std",
    smooth=1,
    budget="partition",
):
    _check_rows("compress_varlen", "[T, H, D]", key=key, value=value)
    _check_devices("compress_varlen", key=key, cu_seqlens=cu_seqlens, start=start)
    rows, heads, _ = key.shape
    return (
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        key.new_empty((heads, rows), dtype=torch.int32),
        cu_seqlens.new_empty(cu_seqlens.shape),
        start.new_empty(start.shape),
    )


@torch.library.register_fake("lagkv::compress_paged_")
def _(
    key_cache,
    value_cache,
    block_table,
    start,
    length,
    lag_size,
    keep,
    *,
    value_weight=1.0,
    score="std",
    smooth=1,
    budget="partition",
    scores=None,
    sink_size=0,
):
    op = "compress_paged_"
    _check_rows(op, "[blocks, block_size, H, D]", key_cache=key_cache, value_cache=value_cache)
    _check_rank(op, "block_table", block_table, "[B, max_blocks]")
    _check_devices(op, key_cache=key_cache, block_table=block_table, start=start, length=length)
    _check_scores_device(op, scores, key_cache=key_cache)
    _, block_size, heads, _ = key_cache.shape
    batch, width = block_table.shape
    return key_cache.new_empty((batch, heads, width * block_size), dtype=torch.int32)


@torch.library.register_fake("lagkv::compress_blocks")
def _(
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
):
    op = "compress_blocks"
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if x.dim() not in (4, 6):
            layouts = "[blocks, block_size, H, D], or 6 [blocks, block_size / r, r, H, D / c, c]"
            _refuse(op, f"{name} must have 4 dimensions {layouts}, got shape {list(x.shape)}")
        _check_dtype(op, name, x)
    _check_rank(op, "source_table", source_table, "[B, max_source]")
    _check_rank(op, "target_table", target_table, "[B, max_target]")
    _check_devices(
        op,
        key_cache=key_cache,
        value_cache=value_cache,
        source_table=source_table,
        target_table=target_table,
        m_before=m_before,
        m_after=m_after,
    )
    split = key_cache.dim() == 6
    block_size = key_cache.shape[1] * key_cache.shape[2] if split else key_cache.shape[1]
    shape = (source_table.shape[0], key_cache.shape[3 if split else 2], target_table.shape[1] * block_size)
    return key_cache.new_empty(shape, dtype=torch.int32)


def _check_rows(op: str, layout: str, **tensors: Tensor) -> None:
    """Ranks, dtypes and devices of tensors that hold rows."""
    for name, x in tensors.items():
        _check_rank(op, name, x, layout)
        _check_dtype(op, name, x)
    _check_devices(op, **tensors)


def _check_dtype(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in arguments.FLOATING:
        dtype = str(x.dtype).removeprefix("torch.")
        _refuse(op, f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")


def _check_devices(op: str, **tensors: Tensor) -> None:
    (first, of), *others = tensors.items()
    for name, x in others:
        if x.device != of.device:
            _refuse(op, f"{name} must be on the device of {first} ({of.device}), got {x.device}")


def _check_score_dtype(op: str, name: str, x: Tensor, **rows: Tensor) -> None:
    ((of, key),) = rows.items()
    wanted, got, dtype = (
        str(t).removeprefix("torch.") for t in (formulas.arithmetic_dtype(key.dtype), x.dtype, key.dtype)
    )
    if got != wanted:
        _refuse(op, f"{name} must be {wanted} where {of} is {dtype}, got {got}")


def _check_scores_device(op: str, scores: Tensor | None, **rows: Tensor) -> None:
    if scores is not None:
        _check_devices(op, **rows, scores=scores)


def _check_rank(op: str, name: str, x: Tensor, layout: str) -> None:
    rank = layout.count(",") + 1
    if x.dim() != rank:
        _refuse(op, f"{name} must have {rank} dimensions {layout}, got shape {list(x.shape)}")


def _refuse(op: str, message: str) -> None:
    raise RuntimeError(f"lagkv::{op}: {message}")
