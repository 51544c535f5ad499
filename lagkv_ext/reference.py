"""LagKV in plain PyTorch: the semantics of record, against which every kernel is tested.

Written to be read next to the paper (arXiv 2504.04704, section 3), not to be fast. Every function has the signature
and the result of the operator of the same name in ``torch.ops.lagkv``. Shapes: ``B`` batch, ``H`` KV heads, ``N``
tokens, ``D`` head dim, ``P`` partitions of ``L = lag_size`` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext import checks


def partition_bounds(x: Tensor, start: int, lag_size: int) -> Tensor:
    """Per-channel minimum and maximum of every full partition: ``[B, H, P, 2, D]``."""
    checks.check_partition_bounds(x, start, lag_size)
    tiles = _partitions(x, start, lag_size)  # [B, H, P, L, D]
    return torch.stack([tiles.amin(dim=3), tiles.amax(dim=3)], dim=3)


def lag_score(
    key: Tensor, value: Tensor, start: int, lag_size: int, *, value_weight: float = 1.0, score: str = "std"
) -> Tensor:
    """Score of every token of the partitions ``0 .. P-2``: ``[B, H, P-1, L]`` (empty where ``P < 2``)."""
    checks.check_lag_score(key, value, start, lag_size, value_weight, score)
    if checks.compressed_count(key.shape[2], start, lag_size) == 0:
        return key.new_empty((*key.shape[:2], 0, lag_size), dtype=checks.arithmetic_dtype(key.dtype))
    one = {"std": _std_score, "cosine": _cosine_score}[score]
    return one(_partitions(key, start, lag_size)) + value_weight * one(_partitions(value, start, lag_size))


def topk_index(score: Tensor, keep: int) -> Tensor:
    """Positions of the ``keep`` highest scores, ascending, int32. Ties: lower position first; NaN is highest."""
    checks.check_topk_index(score, keep)
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values.to(torch.int32)


def compact(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [B, H, N, D]`` at the positions ``index [B, H, K]``: ``[B, H, K, D]``."""
    checks.check_compact(x, index)
    checks.check_index_range(index, x.shape[2])
    # Not torch.gather: on the CPU that rewrites the bits of a bfloat16 NaN.
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    head = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[batch, head, index.long()]


def compress(
    key: Tensor,
    value: Tensor,
    start: int,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole method: ``(key [B, H, N', Dk], value [B, H, N', Dv], index [B, H, N'])``.

    The gradient of key and value goes back to the rows that were kept; the choice of rows has none.
    """
    checks.check_compress(key, value, start, lag_size, keep, value_weight, score)
    scores = lag_score(key.detach(), value.detach(), start, lag_size, value_weight=value_weight, score=score)
    index = _kept_index(topk_index(scores, keep), key.shape[2], start, lag_size)
    return compact(key, index), compact(value, index), index


def compress_(
    key: Tensor,
    value: Tensor,
    start: int,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
) -> Tensor:
    """`compress` into the first ``N'`` rows of ``key`` and ``value``; returns the index."""
    checks.check_compress_(key, value, start, lag_size, keep, value_weight, score)
    new_key, new_value, index = compress(
        key, value, start, lag_size, keep, value_weight=value_weight, score=score
    )
    key[:, :, : index.shape[2]] = new_key
    value[:, :, : index.shape[2]] = new_value
    return index


def _partitions(x: Tensor, start: int, lag_size: int) -> Tensor:
    """The full partitions of ``x [B, H, N, D]`` as ``[B, H, P, L, D]``, in the arithmetic's dtype."""
    count = checks.partition_count(x.shape[2], start, lag_size)
    tiles = x[:, :, start : start + count * lag_size].unflatten(2, (count, lag_size))
    return tiles.to(checks.arithmetic_dtype(x.dtype))


def _std_score(tiles: Tensor) -> Tensor:
    """Equations 1 to 5 of the paper: softmax over tokens of the deviation over normalised channels."""
    lo = tiles[:, :, 1:].amin(dim=3, keepdim=True)
    hi = tiles[:, :, 1:].amax(dim=3, keepdim=True)
    # A channel with equal bounds says nothing about its tokens: y = 0.
    y = torch.where(hi == lo, 0.0, (tiles[:, :, :-1] - lo) / (hi - lo))
    if y.shape[-1] == 1:
        return torch.softmax(torch.zeros_like(y[..., 0]), dim=-1)
    return torch.softmax(y.std(dim=-1), dim=-1)


def _cosine_score(tiles: Tensor) -> Tensor:
    """Standardised minus cosine between a token and the mean direction of the next partition."""
    direction = _divide_or_zero(tiles, tiles.norm(dim=-1, keepdim=True))
    anchor = direction[:, :, 1:].mean(dim=3, keepdim=True)
    anchor = _divide_or_zero(anchor, anchor.norm(dim=-1, keepdim=True))
    s = -(direction[:, :, :-1] * anchor).sum(dim=-1)  # [B, H, P-1, L]
    if s.shape[-1] == 1:
        return torch.zeros_like(s)
    return _divide_or_zero(s - s.mean(dim=-1, keepdim=True), s.std(dim=-1, keepdim=True))


def _divide_or_zero(x: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 0.0, x / divisor)


def _kept_index(topk: Tensor, length: int, start: int, lag_size: int) -> Tensor:
    """Input positions of the output rows: sink, kept tokens ``topk [B, H, P-1, k]``, last partition and remainder."""
    batch, heads, compressed, _ = topk.shape
    if compressed == 0:
        return (
            torch.arange(length, dtype=torch.int32, device=topk.device).expand(batch, heads, length).clone()
        )
    window = start + compressed * lag_size
    position = torch.arange(length, dtype=torch.int32, device=topk.device).expand(batch, heads, length)
    kept = position[:, :, start:window].unflatten(2, (compressed, lag_size)).gather(3, topk.long())
    return torch.cat([position[:, :, :start], kept.flatten(2), position[:, :, window:]], dim=2)
