"""Compression between blocks of an engine's pool, for Python.

Raw rows stay where they are and kept rows get blocks of their own, so that an engine can share both by a prefix's hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext import arguments
from lagkv_ext.ops import method_arguments
from lagkv_ext.ragged import validate_numbers

__all__ = ["compress_blocks"]


def compress_blocks(
    key_cache: Tensor,
    value_cache: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    m_before: Tensor,
    m_after: Tensor,
    *,
    sink_size: int = 16,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    validate: bool = False,
) -> Tensor:
    """Write the kept rows of some partitions of each sequence to other blocks of the same pool.

    Token ``t`` of sequence ``b`` is row ``t % block_size`` of block ``source_table[b, t // block_size]``; partition
    ``p`` begins at token ``sink_size + p * lag_size``. The partitions ``m_before[b] .. m_after[b] - 1`` are compressed,
    each by the partition behind it, as :func:`lagkv_ext.compress` does. Their kept rows become the first
    ``(m_after[b] - m_before[b]) * keep`` rows of the blocks ``target_table[b]``, in order.

    Where the sink ends inside a block, one more target block is written, the mixed block: the last
    ``sink_size % block_size`` rows of the sink, then the tokens from ``sink_size + m_after[b] * lag_size`` on. With the
    full blocks of the sink before and the raw blocks behind, the sequence is whole blocks again. A sequence whose two
    numbers are equal is not touched. Source blocks are only read. Not differentiable.

    Args:
        key_cache: ``[blocks, block_size, H, Dk]`` (blocks of the pool, rows of a block, KV heads, head dim); float16,
            bfloat16, float32 or float64. Any strides; on devices other than the CPU with a contiguous last dimension.
            The CPU also takes ``[blocks, block_size / r, r, H, Dk / c, c]``, for layouts in which no view has rows and
            channels in one dimension each (vLLM's AMX). ``block_size`` must divide ``lag_size`` and ``keep``. Changed
            in the target blocks.
        value_cache: ``[blocks, block_size, H, Dv]``, same dtype and device, or split likewise. Changed likewise.
        source_table: ``[B, max_source]`` int32: blocks of each sequence's tokens. Entries other than those of the
            compressed partitions, the one behind them and the sink's last block are never looked at.
        target_table: ``[B, max_target]`` int32: blocks to write. A block that is written must be in use once. Entries
            past the rows that are written are never looked at.
        m_before, m_after: ``[B]`` int32, partitions of each sequence that are compressed before and after the call,
            ``0 <= m_before <= m_after``.
        sink_size: tokens before partition 0.
        lag_size, keep_ratio, keep, value_weight, score, smooth: as for :func:`lagkv_ext.compress`.
        validate: on a device other than the CPU, also check the values of tables and numbers, which waits for the
            device once and cannot be traced. On the CPU they always are.

    Returns:
        ``index [B, H, max_target * block_size]`` int32: token of every target row that was written, then -1.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it must be and what it got; nothing is written
            then. Without ``validate``, a device leaves a sequence alone, its index all -1, whose numbers do not fit
            its tables or whose blocks are not in the pool; it does not notice blocks that are written and used twice.
    """
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth)
    del method["budget"]
    sink_size = arguments.integer("sink_size", sink_size)
    tables = source_table, target_table, m_before, m_after
    if arguments.boolean("validate", validate):
        split = key_cache.dim() == 6
        block_size = key_cache.shape[1] * key_cache.shape[2] if split else key_cache.shape[1]
        sizes = sink_size, method["lag_size"], method["keep"], key_cache.shape[0], block_size
        validate_numbers(torch.ops.lagkv._check_blocks, key_cache, tables, *sizes)
    return torch.ops.lagkv.compress_blocks(key_cache, value_cache, *tables, sink_size, **method)
