"""The operators ``torch.ops.lagkv.*`` as documented functions.

Schemas are in ``csrc/schemas.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``, fake kernels in ``lagkv_ext/fake.py``,
derivatives in ``lagkv_ext/gradients.py``, semantics in ``lagkv_ext/reference.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lagkv_ext import arguments, fake, gradients
from lagkv_ext.formulas import keep_count, next_start, output_length

__all__ = [
    "Carried",
    "Compressed",
    "compact",
    "compress",
    "compress_",
    "compress_carried",
    "keep_count",
    "lag_score",
    "next_start",
    "output_length",
    "partition_bounds",
    "topk_index",
]

DEFAULT_KEEP_RATIO = 0.25

assert fake  # importing these loads the libraries, and registers what is not in C++
assert gradients


class Compressed(NamedTuple):
    """Result of :func:`compress`."""

    key: Tensor  #: ``[B, H, N', Dk]``
    value: Tensor  #: ``[B, H, N', Dv]``
    index: Tensor  # type: ignore[assignment]  #: ``[B, H, N']`` int32, ascending: input position of every output row


class Carried(NamedTuple):
    """Result of :func:`compress_carried`."""

    key: Tensor  #: ``[B, H, N', Dk]``
    value: Tensor  #: ``[B, H, N', Dv]``
    index: Tensor  # type: ignore[assignment]  #: ``[B, H, N']`` int32, ascending: input position of every output row
    carried: (
        Tensor  #: ``[B, H, C + keep * (P - 1)]``: scores of the rows after the sink that were scored and kept
    )


def compress(
    key: Tensor,
    value: Tensor,
    *,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    sink_size: int = 16,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
) -> Compressed:
    """Drop the least important tokens of a key-value cache (LagKV, arXiv 2504.04704).

    The tokens after the first ``sink_size`` are cut into partitions of ``lag_size``. Every partition but the last
    is normalised with the per-channel minimum and maximum of the next one, each token is scored by its standard
    deviation over channels, and per head the ``keep`` best tokens of the partition stay. The sink, the last full
    partition and the remainder stay as they are. Fewer than two partitions: nothing is dropped.

    Args:
        key: ``[B, H, N, Dk]`` (batch, KV heads, tokens, head dim); float16, bfloat16, float32 or float64; any strides
            with a contiguous last dimension. Not copied and not changed.
        value: ``[B, H, N, Dv]``, same dtype and device.
        lag_size: tokens per partition, ``L >= 1``.
        keep_ratio: share kept of each partition, in ``(0, 1]``: ``keep = max(1, int(keep_ratio * lag_size))``.
            Default 0.25. Exclusive with ``keep``.
        keep: tokens kept of each partition, ``1 <= keep <= lag_size``. Exclusive with ``keep_ratio``.
        sink_size: leading tokens kept as they are (the operator's ``start``). To compress a cache again after tokens
            were appended, pass :func:`next_start` of the compression before.
        value_weight: weight of the values' score against the keys'.
        score: ``"std"`` (the paper), ``"cosine"`` (minus the cosine to the next partition's mean direction), or
            ``"blend"`` (both, in fixed scales).
        smooth: odd, in tokens: a score is the mean over as many tokens around its own, within the partition. 1 is the
            paper's.
        budget: ``"partition"`` (the paper): ``keep`` tokens of each partition; or ``"head"``: as many in all, of all
            partitions that lose tokens together. What earlier compressions kept does not compete:
            :func:`compress_carried` lets it.

    Returns:
        :class:`Compressed` ``(key, value, index)`` with ``N' = output_length(N, sink_size, lag_size, keep)`` tokens,
        rows copied bit for bit, in ascending position. Gradients flow to the kept rows; the choice has none.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it must be and what it got.
    """
    sink_size = arguments.integer("sink_size", sink_size)
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth, budget)
    return Compressed(*torch.ops.lagkv.compress(key, value, sink_size, **method))


def compress_carried(
    key: Tensor,
    value: Tensor,
    carried: Tensor,
    *,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    sink_size: int = 16,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
) -> Carried:
    """:func:`compress` with one budget for a head, where rows that earlier compressions kept compete again.

    The rows of a cache are a sink, ``C`` rows that were kept before and bring their scores, and new ones. The ``C``
    rows and the partitions that lose tokens compete for ``C + keep * (P - 1)`` places. CPU only.

    Args:
        key, value, lag_size, keep_ratio, keep, value_weight, score, smooth: as for :func:`compress`.
        carried: ``[B, H, C]`` float32 (float64 for float64 rows), any strides: ``carried`` of the compression before,
            ``C = 0`` at first. Not changed.
        sink_size: leading tokens that are always kept. Partitions begin at row ``sink_size + C``.

    Returns:
        :class:`Carried` ``(key, value, index, carried)``, lengths as those of :func:`compress`. Gradients flow to the
        kept rows; the choice and the scores have none.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it must be and what it got.
    """
    arguments.tensor("carried", carried)
    sink_size = arguments.integer("sink_size", sink_size)
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth)
    del method["budget"]
    start = sink_size + (carried.shape[-1] if carried.dim() > 0 else 0)
    return Carried(*torch.ops.lagkv.compress_carried(key, value, carried, start, **method))


def compress_(
    key: Tensor,
    value: Tensor,
    *,
    lag_size: int = 128,
    keep_ratio: float | None = None,
    keep: int | None = None,
    sink_size: int = 16,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
    scores: Tensor | None = None,
    start: int | None = None,
) -> Tensor:
    """:func:`compress` in place: the result is in the first ``N'`` rows of ``key`` and ``value``.

    Allocates the index and ``O(B * H * N)`` bytes of scratch, nothing else. Rows past ``N'`` are left in an unspecified
    state. Not differentiable.

    Args:
        key, value, lag_size, keep_ratio, keep, sink_size, value_weight, score, smooth, budget: as for
            :func:`compress`.
        scores: ``[B, H, N]`` float32 (float64 for float64 rows), any strides, with ``budget="head"`` alone. Goes with
            the rows: the rows ``sink_size .. start - 1`` bring their scores in it and compete again. Changed: the rows
            ``sink_size .. next start - 1`` have theirs in it afterwards.
        start: where partitions begin, ``sink_size`` by default: :func:`next_start` of the compression before.

    Returns:
        ``index [B, H, N']`` int32, ascending: input position of every row that stayed.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`compress`; and where a tensor that is written overlaps itself or
            another in memory, or requires grad while gradients are recorded. Nothing is written then. Tensors that
            interleave without sharing an element (halves of one buffer ``[..., 2 D]``, say) do not overlap.
    """
    sink_size = arguments.integer("sink_size", sink_size)
    method = method_arguments(lag_size, keep_ratio, keep, value_weight, score, smooth, budget)
    start = sink_size if start is None else arguments.integer("start", start)
    if scores is not None:
        method |= {"scores": arguments.tensor("scores", scores), "sink_size": sink_size}
    return torch.ops.lagkv.compress_(key, value, start, **method)


def partition_bounds(x: Tensor, *, lag_size: int = 128, sink_size: int = 16) -> Tensor:
    """Per-channel minimum and maximum of every full partition.

    Args:
        x: ``[B, H, N, D]``, keys or values.
        lag_size: tokens per partition.
        sink_size: leading tokens that belong to no partition.

    Returns:
        ``[B, H, P, 2, D]`` (minimum, maximum), ``P = max(0, (N - sink_size) // lag_size)``; float32, float64 for
        float64 input. A NaN makes the bounds of its channel NaN. Not differentiable: going backward through it raises.
    """
    sink_size = arguments.integer("sink_size", sink_size)
    return torch.ops.lagkv.partition_bounds(x, sink_size, arguments.integer("lag_size", lag_size))


def lag_score(
    key: Tensor,
    value: Tensor,
    *,
    lag_size: int = 128,
    sink_size: int = 16,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
) -> Tensor:
    """Score of every token that can be dropped; higher is kept. Arguments as for :func:`compress`.

    Returns:
        ``[B, H, max(0, P - 1), L]``; float32, float64 for float64 input. Not differentiable: going backward through it
        raises.
    """
    return torch.ops.lagkv.lag_score(
        key,
        value,
        arguments.integer("sink_size", sink_size),
        arguments.integer("lag_size", lag_size),
        value_weight=arguments.number("value_weight", value_weight),
        score=arguments.text("score", score),
        smooth=arguments.integer("smooth", smooth),
    )


def topk_index(score: Tensor, keep: int) -> Tensor:
    """Positions of the ``keep`` highest scores along the last dimension, in ascending position.

    Args:
        score: ``[..., L]``, floating point, contiguous last dimension.
        keep: ``1 <= keep <= L``.

    Returns:
        ``[..., keep]`` int32. Equal scores: the lower position wins. NaN ranks highest.
    """
    return torch.ops.lagkv.topk_index(score, arguments.integer("keep", keep))


def compact(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: ``out[b, h, i] = x[b, h, index[b, h, i]]``.

    Args:
        x: ``[B, H, N, D]``.
        index: ``[B, H, K]`` int32, in ``[0, N)``, any order, repeats allowed.

    Returns:
        ``[B, H, K, D]``, contiguous, bit for bit. Gradients add up at the gathered rows.

    Raises:
        RuntimeError: on the CPU also for a position out of range; on CUDA such a position is a device-side assertion.
    """
    return torch.ops.lagkv.compact(x, index)


def method_arguments(
    lag_size: int,
    keep_ratio: float | None,
    keep: int | None,
    value_weight: float,
    score: str,
    smooth: int = 1,
    budget: str = "partition",
) -> dict[str, Any]:
    """The method's parameters as the operators take them. TypeError or ValueError names a wrong one."""
    lag_size = arguments.integer("lag_size", lag_size)
    return {
        "lag_size": lag_size,
        "keep": resolve_keep(keep, keep_ratio, lag_size),
        "value_weight": arguments.number("value_weight", value_weight),
        "score": arguments.text("score", score),
        "smooth": arguments.integer("smooth", smooth),
        "budget": arguments.text("budget", budget),
    }


def resolve_keep(keep: int | None, keep_ratio: float | None, lag_size: int) -> int:
    """``keep`` as given, or what ``keep_ratio`` comes to; an error where both are given."""
    if keep is None:
        return keep_count(DEFAULT_KEEP_RATIO if keep_ratio is None else keep_ratio, lag_size)
    if keep_ratio is not None:
        raise ValueError(f"give keep or keep_ratio, not both; got keep={keep} and keep_ratio={keep_ratio}")
    return arguments.integer("keep", keep)
