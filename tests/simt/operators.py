"""The six operators on CPU tensors, computed by the CUDA kernels in the executor.

Signatures as in ``lagkv_ext.reference``.

``settings(...)`` changes, for a ``with`` block, what the planner believes of the device and how the executor runs;
``last()`` is the session of the latest operator call, with its counters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import simt
from lagkv_ext import checks

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


def compress(
    key, value, start, lag_size, keep, *, value_weight=1.0, score="std"
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_compress(key, value, start, lag_size, keep, value_weight, score)
    rows = checks.output_length(key.shape[2], start, lag_size, keep)
    outputs = (
        key.new_empty((*key.shape[:2], rows, key.shape[3])),
        value.new_empty((*key.shape[:2], rows, value.shape[3])),
        key.new_empty((*key.shape[:2], rows), dtype=torch.int32),
    )
    if outputs[2].numel():
        _run(
            "compress", key.dtype, (key, value, *outputs), _sizes(start, lag_size, keep, value_weight, score)
        )
    return outputs


def compress_(key, value, start, lag_size, keep, *, value_weight=1.0, score="std") -> Tensor:
    checks.check_compress_(key, value, start, lag_size, keep, value_weight, score)
    rows = checks.output_length(key.shape[2], start, lag_size, keep)
    index = key.new_empty((*key.shape[:2], rows), dtype=torch.int32)
    if index.numel():
        _run("compress_", key.dtype, (key, value, index), _sizes(start, lag_size, keep, value_weight, score))
    return index


def lag_score(key, value, start, lag_size, *, value_weight=1.0, score="std") -> Tensor:
    checks.check_lag_score(key, value, start, lag_size, value_weight, score)
    count = checks.compressed_count(key.shape[2], start, lag_size)
    result = key.new_empty((*key.shape[:2], count, lag_size), dtype=checks.arithmetic_dtype(key.dtype))
    if result.numel():
        _run(
            "lag_score",
            key.dtype,
            (key, value, result),
            _sizes(start, lag_size, lag_size, value_weight, score),
        )
    return result


def partition_bounds(x, start, lag_size) -> Tensor:
    checks.check_partition_bounds(x, start, lag_size)
    count = checks.partition_count(x.shape[2], start, lag_size)
    bounds = x.new_empty((*x.shape[:2], count, 2, x.shape[3]), dtype=checks.arithmetic_dtype(x.dtype))
    if bounds.numel():
        _run("partition_bounds", x.dtype, (x, bounds), start, lag_size)
    return bounds


def topk_index(score, keep) -> Tensor:
    checks.check_topk_index(score, keep)
    index = score.new_empty((*score.shape[:-1], keep), dtype=torch.int32)
    if index.numel() and not _run("topk_index", score.dtype, (score, index), keep):
        _run("topk_index", score.dtype, (score.clone(memory_format=torch.contiguous_format), index), keep)
    return index


def compact(x, index) -> Tensor:
    checks.check_compact(x, index)
    out = x.new_empty((*index.shape, x.shape[3]))
    if out.numel():
        _run("compact", x.dtype, (x, index, out))
    return out


def _sizes(start, lag_size, keep, value_weight, score) -> Any:
    return simt.module().Sizes(start, lag_size, keep, float(value_weight), score)


def _run(operator: str, dtype: torch.dtype, tensors: tuple[Tensor, ...], *rest: Any) -> Any:
    """One call of the bindings; every element of every output must have been written."""
    global _last
    module = simt.module()
    session = module.Session(**_session)
    kernels = getattr(module, "lagkv_" + str(dtype).removeprefix("torch."))
    done = getattr(kernels, operator)(session, *map(simt.tensor, tensors), *rest, module.Device(**_device))
    _last = session
    if done is not False:
        unwritten = session.unwritten()
        assert not unwritten, f"{operator} left elements of its outputs unwritten: {unwritten}"
    return done
