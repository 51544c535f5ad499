"""The ragged operators for Python: sequences that each have their own start and length, in slots, packed rows or pages.

Every function does to each sequence what :func:`lagkv_ext.compress` does to it alone (spec section 3). Starts and
lengths are int32 tensors on the device of the cache, read and written there: nothing waits for the host, and lengths
may change under a compiled function or a captured CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lagkv_ext import checks_ragged
from lagkv_ext.ops import register_in_place, resolve_keep

__all__ = ["PackedCompressed", "compress_paged_", "compress_ragged_", "compress_varlen"]


class PackedCompressed(NamedTuple):
    """Result of :func:`compress_varlen`."""

    key: Tensor  #: ``[T, H, Dk]``, the first ``cu_seqlens[-1]`` rows valid
    value: Tensor  #: ``[T, H, Dv]``, likewise
    index: Tensor  # type: ignore[assignment]  #: ``[H, T]`` int32: position in its sequence of every row, then -1
    cu_seqlens: Tensor  #: ``[B + 1]`` int32
    start: Tensor  #: ``[B]`` int32: `start` of the next compression


def compress_ragged_(
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    value_weight: float = 1.0,
    score: str = "std",
    validate: bool = False,
) -> Tensor:
    keep = resolve_keep(keep, keep_ratio, lag_size)
    _refuse_grad("compress_ragged_", key=key, value=value)
    if validate and not key.is_cpu:  # on the CPU the operator does
        checks_ragged.check_compress_ragged_(key, value, start, length, lag_size, keep, value_weight, score)
        checks_ragged.check_slot_values(start, length, key.shape[2])
    return torch.ops.lagkv.compress_ragged_(
        key, value, start, length, lag_size, keep, value_weight=float(value_weight), score=score
    )


def compress_varlen(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    start: Tensor,
    *,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    value_weight: float = 1.0,
    score: str = "std",
    validate: bool = False,
) -> PackedCompressed:
    keep = resolve_keep(keep, keep_ratio, lag_size)
    if validate and not key.is_cpu:  # on the CPU the operator does
        checks_ragged.check_compress_varlen(
            key, value, cu_seqlens, start, lag_size, keep, value_weight, score
        )
        checks_ragged.check_packed_values(cu_seqlens, start, key.shape[0])
    return PackedCompressed(
        *torch.ops.lagkv.compress_varlen(
            key, value, cu_seqlens, start, lag_size, keep, value_weight=float(value_weight), score=score
        )
    )


def compress_paged_(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    value_weight: float = 1.0,
    score: str = "std",
    validate: bool = False,
) -> Tensor:
    keep = resolve_keep(keep, keep_ratio, lag_size)
    _refuse_grad("compress_paged_", key_cache=key_cache, value_cache=value_cache)
    if validate and not key_cache.is_cpu:  # on the CPU the operator does
        checks_ragged.check_compress_paged_(
            key_cache, value_cache, block_table, start, length, lag_size, keep, value_weight, score
        )
        checks_ragged.check_page_values(block_table, start, length, lag_size, keep, *key_cache.shape[:2])
    return torch.ops.lagkv.compress_paged_(
        key_cache,
        value_cache,
        block_table,
        start,
        length,
        lag_size,
        keep,
        value_weight=float(value_weight),
        score=score,
    )


def _refuse_grad(op: str, **tensors: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeError(
                f"lagkv::{op}: {name} must not require grad (the operator works in place), got requires_grad=True; "
                "use torch.no_grad()"
            )


@torch.library.register_fake("lagkv::compress_ragged_")
def _(key, value, start, length, lag_size, keep, *, value_weight=1.0, score="std"):
    checks_ragged.check_compress_ragged_(key, value, start, length, lag_size, keep, value_weight, score)
    return key.new_empty(key.shape[:3], dtype=torch.int32)


@torch.library.register_fake("lagkv::compress_varlen")
def _(key, value, cu_seqlens, start, lag_size, keep, *, value_weight=1.0, score="std"):
    checks_ragged.check_compress_varlen(key, value, cu_seqlens, start, lag_size, keep, value_weight, score)
    return (
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        key.new_empty((key.shape[1], key.shape[0]), dtype=torch.int32),
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
):
    checks_ragged.check_compress_paged_(
        key_cache, value_cache, block_table, start, length, lag_size, keep, value_weight, score
    )
    _, block_size, heads, _ = key_cache.shape
    batch, width = block_table.shape
    return key_cache.new_empty((batch, heads, width * block_size), dtype=torch.int32)


register_in_place("compress_ragged_", (0, 1, 2, 3))
register_in_place("compress_paged_", (0, 1, 3, 4))
