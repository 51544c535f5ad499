"""Sizes of a compression (spec, section 1): functions of lengths and parameters alone.

All of them work on symbolic sizes, and then ask nothing about them. csrc/params.h has the same for C++; a test holds
the two to each other and to the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from lagkv_ext import arguments


def partition_count(length: int, start: int, lag_size: int) -> int:
    """``P``: full partitions of ``lag_size`` tokens after the first ``start`` of ``length`` tokens.

    Raises:
        TypeError, ValueError: as :func:`output_length`.
    """
    length, start, lag_size = _sizes(length, start, lag_size)
    return _max((length - start) // lag_size, 0)


def compressed_count(length: int, start: int, lag_size: int) -> int:
    """Partitions that lose tokens: ``P - 1``, all but the last.

    Raises:
        TypeError, ValueError: as :func:`output_length`.
    """
    length, start, lag_size = _sizes(length, start, lag_size)
    return _max((length - start) // lag_size - 1, 0)


def output_length(length: int, start: int, lag_size: int, keep: int) -> int:
    """Rows left of ``length`` tokens: ``N' = N - (P - 1) (L - k)``, and ``N`` where ``P < 2``.

    Raises:
        TypeError, ValueError: naming the argument that is no integer or out of range (``length, start >= 0``,
            ``1 <= keep <= lag_size``).
    """
    length, start, lag_size = _sizes(length, start, lag_size)
    keep = checked_keep(keep, lag_size)
    # A sum of terms that cannot be negative (prefix, last partition and remainder; kept tokens): only so can
    # torch.export see that no length makes the output's size negative, 0 or 1.
    untouched = _min(length, start + lag_size + (length - start) % lag_size)
    return untouched + keep * compressed_count(length, start, lag_size)


def next_start(length: int, start: int, lag_size: int, keep: int) -> int:
    """``start`` of the compression after one of ``length`` tokens: ``start + keep * (P - 1)``.

    Raises:
        TypeError, ValueError: as :func:`output_length`.
    """
    length, start, lag_size = _sizes(length, start, lag_size)
    return start + checked_keep(keep, lag_size) * compressed_count(length, start, lag_size)


def keep_count(keep_ratio: float, lag_size: int) -> int:
    """Tokens kept of a partition: ``max(1, int(keep_ratio * lag_size))`` for ``keep_ratio`` in ``(0, 1]``.

    Raises:
        TypeError, ValueError: naming the argument that is no number or out of range.
    """
    lag_size = arguments.integer("lag_size", lag_size, minimum=1)
    return _max(1, torch.sym_int(arguments.ratio("keep_ratio", keep_ratio) * lag_size))


def checked_keep(keep: int, lag_size: int) -> int:
    """``keep``, which must be an integer in ``[1, lag_size]``; a symbolic one passes."""
    keep = arguments.integer("keep", keep, minimum=1)
    if type(keep) is type(lag_size) is int and not is_dynamo_compiling() and keep > lag_size:
        raise ValueError(f"keep must be at most lag_size ({lag_size}), got {keep}")
    return keep


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other storage type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sizes(length: int, start: int, lag_size: int) -> tuple[int, int, int]:
    return (
        arguments.integer("length", length, minimum=0),
        arguments.integer("start", start, minimum=0),
        arguments.integer("lag_size", lag_size, minimum=1),
    )


# The builtin max and min would ask a symbolic size which is larger, and so fix it.


def _max(a: Any, b: Any) -> Any:
    return max(a, b) if type(a) is type(b) is int else torch.sym_max(a, b)


def _min(a: Any, b: Any) -> Any:
    return min(a, b) if type(a) is type(b) is int else torch.sym_min(a, b)
