"""The ragged operators for Python: sequences that each have their own start and length, in slots, packed rows or pages.

Every function does to each sequence what :func:`lagkv_ext.compress` does to it alone (docs/method.md 4). Starts and
lengths are int32 tensors on the device of the cache, read and written there: nothing waits for the host, and lengths
may change under a compiled function or a captured CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lagkv_ext import arguments
from lagkv_ext.ops import method_arguments

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
    smooth: int = 1,
    budget: str = "partition",
    scores: Tensor | None = None,
    sink_size: int = 16,
    validate: bool = False,
) -> Tensor:
    """:func:`lagkv_ext.compress` of every slot of a batch in place, each with its own start and length.

    Sequence ``b`` is the first ``length[b]`` rows of ``key[b]`` and ``value[b]``; its result is in the first rows of
    the same slot. A sequence shorter than ``start + 2 * lag_size`` stays as it is, and so does one that ends before
    its start (an empty slot). Not differentiable.

    Args:
        key: ``[B, H, capacity, Dk]`` (slots, KV heads, rows of a slot, head dim); float16, bfloat16, float32 or
            float64; any strides with a contiguous last dimension. Changed. Rows past the length are never read.
        value: ``[B, H, capacity, Dv]``, same dtype and device. Changed.
        start: ``[B]`` int32, tokens: leading tokens kept as they are (the sink at first). Becomes the start of the
            next compression, ``start + keep * (P - 1)``.
        length: ``[B]`` int32, tokens in each slot, ``0 <= length <= capacity``. Becomes the new length.
        lag_size, keep_ratio, keep, value_weight, score, smooth, budget: as for :func:`lagkv_ext.compress`.
        scores: ``[B, H, capacity]`` float32 (float64 for float64 rows), any strides, with ``budget="head"`` alone. Goes
            with the rows: the rows ``sink_size .. start[b] - 1`` bring their scores in it and compete again. Changed:
            the rows up to the new start have theirs in it afterwards.
        sink_size: leading tokens that never compete, with ``scores`` alone. A start below it is a sink as well.
        validate: on a device other than the CPU, also check the values of start and length, which waits for the
            device once and cannot be traced. On the CPU they always are.

    Returns:
        ``index [B, H, capacity]`` int32: position in its sequence of every row that stayed, ascending; -1 past the new
        length. Rows past the new length are left in an unspecified state (those past the old one as they were).

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it must be and what it got; nothing is written
            then. Without ``validate``, a device leaves a sequence whose start or length is invalid unchanged, its
            index all -1.
    """
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth, budget)
    method |= _scores(scores, sink_size)
    if arguments.boolean("validate", validate):
        validate_numbers(torch.ops.lagkv._check_slots, key, (start, length), key.shape[2])
    return torch.ops.lagkv.compress_ragged_(key, value, start, length, **method)


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
    smooth: int = 1,
    budget: str = "partition",
    validate: bool = False,
) -> PackedCompressed:
    """:func:`lagkv_ext.compress` of sequences packed one after the other, as variable-length attention takes them.

    Sequence ``b`` is the rows ``cu_seqlens[b] .. cu_seqlens[b + 1] - 1``, and so it is in the result.

    Args:
        key: ``[T, H, Dk]`` (rows of all sequences, KV heads, head dim); float16, bfloat16, float32 or float64; any
            strides with a contiguous last dimension. Neither copied nor changed. Rows past ``cu_seqlens[-1]`` are
            never read.
        value: ``[T, H, Dv]``, same dtype and device.
        cu_seqlens: ``[B + 1]`` int32, rows: begins with 0, does not decrease, ends at ``T`` or before.
        start: ``[B]`` int32, tokens: leading tokens of each sequence kept as they are.
        lag_size, keep_ratio, keep, value_weight, score, smooth, budget: as for :func:`lagkv_ext.compress`.
        validate: on a device other than the CPU, also check the values of cu_seqlens and start, which waits for the
            device once and cannot be traced. On the CPU they always are.

    Returns:
        :class:`PackedCompressed` ``(key, value, index, cu_seqlens, start)``: packed rows in buffers of ``T`` rows, as
        no one on the host knows how many there are. The first ``cu_seqlens[-1]`` are valid, the rest unspecified.
        Gradients flow to the kept rows; the choice has none.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it must be and what it got. Without ``validate``,
            a device answers invalid cu_seqlens with no rows at all (cu_seqlens 0, index -1).
    """
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth, budget)
    if arguments.boolean("validate", validate):
        validate_numbers(torch.ops.lagkv._check_packed, key, (cu_seqlens, start), key.shape[0])
    return PackedCompressed(*torch.ops.lagkv.compress_varlen(key, value, cu_seqlens, start, **method))


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
    smooth: int = 1,
    budget: str = "partition",
    scores: Tensor | None = None,
    sink_size: int = 16,
    validate: bool = False,
) -> Tensor:
    """:func:`lagkv_ext.compress` of sequences in the pages of an engine's block pool, in place.

    Token ``i`` of sequence ``b`` is row ``i % block_size`` of block ``block_table[b, i // block_size]``, before and
    after: the rows that stay move to the front of the sequence's own pages. The caller may return
    ``block_table[b, ceil(length[b] / block_size):]``, with the new length. Not differentiable.

    The order of dimensions is blocks, rows, heads, channels, in any strides: ``kv[0], kv[1]`` of vLLM's
    ``[2, blocks, block_size, H, D]``; ``kv[:, 0], kv[:, 1]`` of FlashInfer's NHD ``[blocks, 2, block_size, H, D]``;
    ``kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)`` of its HND ``[blocks, 2, H, block_size, D]``. Nothing is
    copied for it.

    Args:
        key_cache: ``[blocks, block_size, H, Dk]``; float16, bfloat16, float32 or float64; any strides with a contiguous
            last dimension. Changed: rows between the start (with
            ``scores``: ``sink_size``) and the new length of compressed sequences, nothing else.
        value_cache: ``[blocks, block_size, H, Dv]``, same dtype and device. Changed likewise.
        block_table: ``[B, max_blocks]`` int32: the pages of every sequence in order. Entries past the pages of
            ``length`` tokens are never looked at. A page may be shared (a common prefix) as long as no one writes it.
        start: ``[B]`` int32, tokens: leading tokens kept as they are. Becomes the start of the next compression.
        length: ``[B]`` int32, tokens, ``0 <= length <= max_blocks * block_size``. Becomes the new length.
        lag_size, keep_ratio, keep, value_weight, score, smooth, budget: as for :func:`lagkv_ext.compress`.
        scores: ``[blocks, block_size, H]`` float32 (float64 for float64 rows), any strides, with ``budget="head"``
            alone. Goes with the rows, by the same block table: the rows ``sink_size .. start[b] - 1`` bring their
            scores in it and compete again, so that their pages are written too. Changed: the rows up to the new start
            have theirs in it afterwards.
        sink_size: leading tokens that never compete, with ``scores`` alone. A start below it is a sink as well.
        validate: on a device other than the CPU, also check the values of block_table, start and length, which waits
            for the device once and cannot be traced. On the CPU they always are.

    Returns:
        ``index [B, H, max_blocks * block_size]`` int32: position in its sequence (not in the pool) of every row that
        stayed, ascending; -1 past the new length.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it must be and what it got, also for a page
            outside the pool and for one that is written and used twice; nothing is written then. Without ``validate``,
            a device leaves a sequence whose start, length or pages are invalid unchanged, its index all -1; it does
            not notice pages that are written and used twice.
    """
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth, budget)
    method |= _scores(scores, sink_size)
    if arguments.boolean("validate", validate):
        shape, scored = key_cache.shape[:2], (scores is not None, method.get("sink_size", 0))
        sizes = (method["lag_size"], method["keep"], *shape, *scored)
        validate_numbers(torch.ops.lagkv._check_pages, key_cache, (block_table, start, length), *sizes)
    return torch.ops.lagkv.compress_paged_(key_cache, value_cache, block_table, start, length, **method)


def _scores(scores: Tensor | None, sink_size: int) -> dict[str, Any]:
    """The arguments of an operator where scores are carried; else none."""
    sink_size = arguments.integer("sink_size", sink_size)
    return {} if scores is None else {"scores": arguments.tensor("scores", scores), "sink_size": sink_size}


def validate_numbers(check: Any, key: Tensor, numbers: tuple[Tensor, ...], *sizes: int) -> None:
    """The CPU operator's checks of values, on copies of a device's numbers: one copy, so one wait. On the CPU the
    operator itself checks them; what has another device or dtype it refuses on any device."""
    if key.is_cpu or any(x.device != key.device or x.dtype != torch.int32 for x in numbers):
        return
    host = torch.cat([x.reshape(-1) for x in numbers]).cpu().split([x.numel() for x in numbers])
    check(*(one.view(x.shape) for one, x in zip(host, numbers, strict=True)), *sizes)
