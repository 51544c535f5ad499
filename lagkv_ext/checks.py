"""Argument checks in Python: for the reference and for tracing, where no kernel runs.

The kernels' own checks are in ``csrc/checks.h``; tests hold the two to the same texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lagkv_ext.arguments import FLOATING, MAX_LENGTH, SCORES


def check_compress(
    key: Tensor,
    value: Tensor,
    start: int,
    lag_size: int,
    keep: int,
    value_weight: float,
    score: str,
    op: str = "compress",
) -> None:
    _check_pair(op, key, value)
    _check_start(op, start)
    check_lag_size(op, lag_size)
    check_keep(op, keep, "lag_size", lag_size)
    check_scoring(op, value_weight, score)


def check_compress_(
    key: Tensor, value: Tensor, start: int, lag_size: int, keep: int, value_weight: float, score: str
) -> None:
    check_compress(key, value, start, lag_size, keep, value_weight, score, op="compress_")


def check_partition_bounds(x: Tensor, start: int, lag_size: int) -> None:
    _check_rows("partition_bounds", "x", x)
    _check_start("partition_bounds", start)
    check_lag_size("partition_bounds", lag_size)


def check_lag_score(
    key: Tensor, value: Tensor, start: int, lag_size: int, value_weight: float, score: str
) -> None:
    _check_pair("lag_score", key, value)
    _check_start("lag_score", start)
    check_lag_size("lag_score", lag_size)
    check_scoring("lag_score", value_weight, score)


def check_topk_index(score: Tensor, keep: int) -> None:
    op = "topk_index"
    check(score.dim() >= 1, op, lambda: "score must have at least 1 dimension [..., L], got a scalar")
    check_dtype(op, "score", score)
    check(
        score.shape[-1] <= MAX_LENGTH,
        op,
        lambda: f"score must have at most {MAX_LENGTH} columns, got {score.shape[-1]}",
    )
    check_keep(op, keep, "the last dimension of score", score.shape[-1])
    check_contiguous(op, "score", score)


def check_compact(x: Tensor, index: Tensor) -> None:
    op = "compact"
    _check_rows(op, "x", x)
    check(
        index.dim() == 3, op, lambda: f"index must have 3 dimensions [B, H, K], got shape {shape_text(index)}"
    )
    check(index.dtype == torch.int32, op, lambda: f"index must be int32, got {dtype_text(index)}")
    check(
        index.device == x.device,
        op,
        lambda: f"index must be on the device of x ({x.device}), got {index.device}",
    )
    check(
        index.shape[0] == x.shape[0] and index.shape[1] == x.shape[1],
        op,
        lambda: f"index must agree with x in batch and heads {shape_text(x)}, got shape {shape_text(index)}",
    )
    check(
        index.shape[2] <= MAX_LENGTH,
        op,
        lambda: f"index must have at most {MAX_LENGTH} columns, got {index.shape[2]}",
    )


def check_index_range(index: Tensor, length: int) -> None:
    """Values of an index; needs the data, so only where they are at hand."""
    bad = index[(index < 0) | (index >= length)]
    check(
        bad.numel() == 0,
        "compact",
        lambda: f"index must hold positions between 0 and {length - 1}, got {int(bad[0])}",
    )


def check(condition: bool, op: str, message: Callable[[], str]) -> None:
    torch._check(condition, lambda: f"lagkv::{op}: {message()}")


def shape_text(x: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def dtype_text(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def check_dtype(op: str, name: str, x: Tensor) -> None:
    check(
        x.dtype in FLOATING,
        op,
        lambda: f"{name} must be float16, bfloat16, float32 or float64, got {dtype_text(x)}",
    )


def _check_rows(op: str, name: str, x: Tensor) -> None:
    check(x.dim() == 4, op, lambda: f"{name} must have 4 dimensions [B, H, N, D], got shape {shape_text(x)}")
    check_dtype(op, name, x)
    check(
        x.shape[2] <= MAX_LENGTH,
        op,
        lambda: f"{name} must have at most {MAX_LENGTH} tokens, got {x.shape[2]}",
    )
    check_contiguous(op, name, x)


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    # Tracing must not specialise on sizes, so the size is only asked for where the stride is wrong.
    if x.stride(-1) != 1:
        check(
            x.shape[-1] <= 1 or x.numel() == 0,
            op,
            lambda: f"{name} must have a contiguous last dimension (stride 1), got stride {x.stride(-1)}",
        )


def _check_pair(op: str, key: Tensor, value: Tensor) -> None:
    _check_rows(op, "key", key)
    _check_rows(op, "value", value)
    check(
        value.dtype == key.dtype,
        op,
        lambda: f"value must have the dtype of key ({dtype_text(key)}), got {dtype_text(value)}",
    )
    check(
        value.device == key.device,
        op,
        lambda: f"value must be on the device of key ({key.device}), got {value.device}",
    )
    for dim, what in enumerate(("batch", "heads", "tokens")):
        _check_agrees(op, key, value, dim, what)


def _check_agrees(op: str, key: Tensor, value: Tensor, dim: int, what: str) -> None:
    check(
        value.shape[dim] == key.shape[dim],
        op,
        lambda: f"value must agree with key in {what} {shape_text(key)}, got shape {shape_text(value)}",
    )


def _check_start(op: str, start: int) -> None:
    check(start >= 0, op, lambda: f"start must be at least 0, got {start}")


def check_lag_size(op: str, lag_size: int) -> None:
    check(lag_size >= 1, op, lambda: f"lag_size must be at least 1, got {lag_size}")


def check_keep(op: str, keep: int, bound_name: str, bound: int) -> None:
    check(keep >= 1, op, lambda: f"keep must be at least 1, got {keep}")
    check(keep <= bound, op, lambda: f"keep must be at most {bound_name} ({bound}), got {keep}")


def check_scoring(op: str, value_weight: float, score: str) -> None:
    check(math.isfinite(value_weight), op, lambda: f"value_weight must be finite, got {value_weight}")
    check(score in SCORES, op, lambda: f"score must be 'std' or 'cosine', got '{score}'")
