"""Argument checks of the ragged operators in Python: of shapes for the reference and for tracing, and of values.

The kernels' own checks are in ``csrc/checks_ragged.h`` and ``csrc/cpu/ragged_values.h``; tests hold the two to the same
texts. Values need the data, so on a device they are only checked on request (``validate=True``), with one copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lagkv_ext import formulas
from lagkv_ext.checks import (
    MAX_LENGTH,
    check,
    check_contiguous,
    check_dtype,
    check_keep,
    check_lag_size,
    check_scoring,
    dtype_text,
    shape_text,
)


class _Layout(NamedTuple):
    key: str
    value: str
    shape: str
    dims: tuple[str, ...]  #: all but the last


_SLOTS = _Layout("key", "value", "[B, H, capacity, D]", ("batch", "heads", "capacity"))
_PACKED = _Layout("key", "value", "[T, H, D]", ("rows", "heads"))
_PAGES = _Layout("key_cache", "value_cache", "[blocks, block_size, H, D]", ("blocks", "block_size", "heads"))


def check_compress_ragged_(
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    lag_size: int,
    keep: int,
    value_weight: float,
    score: str,
) -> None:
    op = "compress_ragged_"
    _check_pair(op, _SLOTS, key, value)
    _check_capacity(op, key.shape[2], "capacity")
    _check_start_and_length(op, _SLOTS, key, start, length, key.shape[0])
    check_lag_size(op, lag_size)
    check_keep(op, keep, "lag_size", lag_size)
    check_scoring(op, value_weight, score)


def check_compress_varlen(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    start: Tensor,
    lag_size: int,
    keep: int,
    value_weight: float,
    score: str,
) -> None:
    op = "compress_varlen"
    _check_pair(op, _PACKED, key, value)
    _check_capacity(op, key.shape[0], "rows")
    _check_numbers(op, _PACKED, key, "cu_seqlens", cu_seqlens)
    check(
        cu_seqlens.shape[0] >= 1,
        op,
        lambda: f"cu_seqlens must have at least 1 number (B + 1 of them), got shape {shape_text(cu_seqlens)}",
    )
    _check_numbers(op, _PACKED, key, "start", start)
    _check_count(op, "start", start, cu_seqlens.shape[0] - 1)
    check_lag_size(op, lag_size)
    check_keep(op, keep, "lag_size", lag_size)
    check_scoring(op, value_weight, score)


def check_compress_paged_(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    start: Tensor,
    length: Tensor,
    lag_size: int,
    keep: int,
    value_weight: float,
    score: str,
) -> None:
    op = "compress_paged_"
    _check_pair(op, _PAGES, key_cache, value_cache)
    check(
        block_table.dim() == 2,
        op,
        lambda: f"block_table must have 2 dimensions [B, max_blocks], got shape {shape_text(block_table)}",
    )
    check(
        block_table.dtype == torch.int32,
        op,
        lambda: f"block_table must be int32, got {dtype_text(block_table)}",
    )
    check(
        block_table.device == key_cache.device,
        op,
        lambda: (
            f"block_table must be on the device of key_cache ({key_cache.device}), got {block_table.device}"
        ),
    )
    check_contiguous(op, "block_table", block_table)
    _check_capacity(op, block_table.shape[1] * key_cache.shape[1], "block_table.size(1) * block_size")
    _check_start_and_length(op, _PAGES, key_cache, start, length, block_table.shape[0])
    check_lag_size(op, lag_size)
    check_keep(op, keep, "lag_size", lag_size)
    check_scoring(op, value_weight, score)


def check_slot_values(start: Tensor, length: Tensor, capacity: int) -> None:
    """Every start and length of slots can be."""
    starts, lengths = _to_host(start, length)
    _check_starts("compress_ragged_", starts)
    _check_lengths("compress_ragged_", lengths, "the capacity", capacity)


def check_packed_values(cu_seqlens: Tensor, start: Tensor, rows: int) -> None:
    """cu_seqlens begins with 0, does not decrease, and stays within the rows."""
    op = "compress_varlen"
    offsets, starts = _to_host(cu_seqlens, start)
    if offsets[0] != 0:
        _refuse(op, f"cu_seqlens must begin with 0, got {offsets[0]}")
    for i in range(1, len(offsets)):
        before, offset = offsets[i - 1 : i + 1]
        if offset < before:
            _refuse(op, f"cu_seqlens must not decrease, got {offset} after {before} at {i}")
        if offset > rows:
            _refuse(op, f"cu_seqlens must be at most the rows of key ({rows}), got {offset} at {i}")
    _check_starts(op, starts)


def check_page_values(
    block_table: Tensor,
    start: Tensor,
    length: Tensor,
    lag_size: int,
    keep: int,
    blocks: int,
    block_size: int,
) -> None:
    """Every length fits its blocks, every block in use is in the pool, and none that is written is in use twice.

    In use are the blocks of the first ``length`` tokens, written those of them from ``start`` to the new length where
    a sequence is compressed (with ``keep < lag_size``: else nothing moves).
    """
    op = "compress_paged_"
    starts, lengths, flat = _to_host(start, length, block_table)
    width = block_table.shape[1]
    _check_starts(op, starts)
    _check_lengths(op, lengths, "the rows of its blocks", width * block_size)
    places: dict[int, list[tuple[int, int]]] = {}  # where a block is in use, in the order of the table
    written: set[int] = set()
    for b, (first, tokens) in enumerate(zip(starts, lengths, strict=True)):
        new_length = tokens - formulas.compressed_count(tokens, first, lag_size) * (lag_size - keep)
        for j in range(-(-tokens // block_size) if tokens else 0):
            block = flat[b * width + j]
            if not 0 <= block < blocks:
                text = f"block_table must hold blocks between 0 and {blocks - 1}, got {block} at [{b}, {j}]"
                _refuse(op, text)
            places.setdefault(block, []).append((b, j))
            if new_length < tokens and first < (j + 1) * block_size and j * block_size < new_length:
                written.add(block)
    for block, ((b, j), *others) in places.items():
        if others and block in written:
            text = "block_table must not hold a block twice that is written"
            _refuse(op, f"{text}, got block {block} at [{b}, {j}] and [{others[0][0]}, {others[0][1]}]")


def _refuse(op: str, text: str) -> None:
    raise RuntimeError(f"lagkv::{op}: {text}")


def _to_host(*tensors: Tensor) -> list[list[int]]:
    """The values of int32 tensors, with one copy from their device."""
    values = torch.cat([x.reshape(-1) for x in tensors]).tolist()
    lists = []
    for x in tensors:
        lists.append(values[: x.numel()])
        values = values[x.numel() :]
    return lists


def _check_starts(op: str, starts: list[int]) -> None:
    for b, n in enumerate(starts):
        if n < 0:
            _refuse(op, f"start must be at least 0, got {n} for sequence {b}")


def _check_lengths(op: str, lengths: list[int], bound_name: str, bound: int) -> None:
    for b, n in enumerate(lengths):
        if not 0 <= n <= bound:
            _refuse(op, f"length must be between 0 and {bound_name} ({bound}), got {n} for sequence {b}")


def _check_pair(op: str, layout: _Layout, key: Tensor, value: Tensor) -> None:
    _check_rows(op, layout, layout.key, key)
    _check_rows(op, layout, layout.value, value)
    check(
        value.dtype == key.dtype,
        op,
        lambda: (
            f"{layout.value} must have the dtype of {layout.key} ({dtype_text(key)}), got {dtype_text(value)}"
        ),
    )
    check(
        value.device == key.device,
        op,
        lambda: f"{layout.value} must be on the device of {layout.key} ({key.device}), got {value.device}",
    )
    for dim, what in enumerate(layout.dims):
        _check_agrees(op, layout, key, value, dim, what)


def _check_agrees(op: str, layout: _Layout, key: Tensor, value: Tensor, dim: int, what: str) -> None:
    names = f"{layout.value} must agree with {layout.key}"
    check(
        value.shape[dim] == key.shape[dim],
        op,
        lambda: f"{names} in {what} {shape_text(key)}, got shape {shape_text(value)}",
    )


def _check_rows(op: str, layout: _Layout, name: str, x: Tensor) -> None:
    rank = len(layout.dims) + 1
    check(
        x.dim() == rank,
        op,
        lambda: f"{name} must have {rank} dimensions {layout.shape}, got shape {shape_text(x)}",
    )
    check_dtype(op, name, x)
    check_contiguous(op, name, x)


def _check_numbers(op: str, layout: _Layout, key: Tensor, name: str, x: Tensor) -> None:
    check(x.dim() == 1, op, lambda: f"{name} must have 1 dimension, got shape {shape_text(x)}")
    check(x.dtype == torch.int32, op, lambda: f"{name} must be int32, got {dtype_text(x)}")
    check(
        x.device == key.device,
        op,
        lambda: f"{name} must be on the device of {layout.key} ({key.device}), got {x.device}",
    )
    if x.stride(0) != 1:
        check(x.shape[0] <= 1, op, lambda: f"{name} must be contiguous, got stride {x.stride(0)}")


def _check_count(op: str, name: str, x: Tensor, batch: int) -> None:
    check(
        x.shape[0] == batch,
        op,
        lambda: f"{name} must have one number for each of {batch} sequences, got shape {shape_text(x)}",
    )


def _check_start_and_length(
    op: str, layout: _Layout, key: Tensor, start: Tensor, length: Tensor, batch: int
) -> None:
    for name, x in (("start", start), ("length", length)):
        _check_numbers(op, layout, key, name, x)
        _check_count(op, name, x, batch)


def _check_capacity(op: str, capacity: int, what: str) -> None:
    check(
        capacity <= MAX_LENGTH,
        op,
        lambda: f"{what} must come to at most {MAX_LENGTH} tokens, got {capacity}",
    )
