"""Lag-relative scores that were tried against the paper's and the cosine score; docs/quality.md says how they did.

Each is a function for ``lagkv evaluate --methods benchmarks.score_candidates:NAME``: one pass, the next partition as
reference, no attention. All but those that end in ``_global`` or ``_shared`` keep the same number of tokens of each
partition, as the operators do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lagkv_ext import lag_score
from lagkv_ext.commands.evaluate.methods import Layer


def _partitions(x: Tensor, layer: Layer) -> Tensor:
    """``[1, H, P, L, D]``: the candidates' partitions and the one after them."""
    free = layer.candidates
    return x[:, :, free.start : free.stop + layer.lag_size].float().unflatten(2, (-1, layer.lag_size))


def _standardised(s: Tensor) -> Tensor:
    return (s - s.mean(dim=-1, keepdim=True)) / s.std(dim=-1, keepdim=True).clamp_min(1e-12)


def _cosine(layer: Layer) -> Tensor:
    """The cosine score ``[1, H, P - 1, L]``."""
    return lag_score(
        layer.key, layer.value, lag_size=layer.lag_size, sink_size=layer.sink_size, score="cosine"
    )


def _std(layer: Layer) -> Tensor:
    """The paper's statistic of keys and of values, each standardised instead of passed through a softmax."""
    total = torch.zeros((), device=layer.key.device)
    for x in (layer.key, layer.value):
        tiles = _partitions(x, layer)
        lo, hi = tiles[:, :, 1:].amin(dim=3, keepdim=True), tiles[:, :, 1:].amax(dim=3, keepdim=True)
        total = total + _standardised(((tiles[:, :, :-1] - lo) / (hi - lo).clamp_min(1e-12)).std(dim=-1))
    return total


def _whole(parts: Tensor, layer: Layer) -> Tensor:
    """``[1, H, N]`` from scores of the candidates; the rest is protected, whatever its score."""
    out = torch.zeros(layer.key.shape[:3], device=layer.key.device)
    out[..., layer.candidates] = parts.flatten(2)
    return out


def _each(parts: Tensor, layer: Layer) -> Tensor:
    """Ranks within partitions: the highest of all ranks are then equally many of each partition."""
    order = parts.argsort(dim=-1, descending=True, stable=True)
    return _whole(-order.argsort(dim=-1).float(), layer)


def _smoothed(s: Tensor, width: int) -> Tensor:
    """Mean over neighbours within the partition, the edges over those there are."""
    flat = F.avg_pool1d(
        s.flatten(0, 2)[:, None], width, stride=1, padding=width // 2, count_include_pad=False
    )
    return flat[:, 0].view_as(s)


def std_z(layer: Layer) -> Tensor:
    """The paper's statistic, standardised: whether the softmax matters."""
    return _each(_std(layer), layer)


def blend(layer: Layer) -> Tensor:
    """Sum of both scores, standardised."""
    return _each(_std(layer) + _cosine(layer), layer)


def either(layer: Layer) -> Tensor:
    """The larger of both."""
    return _each(torch.maximum(_std(layer), _cosine(layer)), layer)


def distance(layer: Layer) -> Tensor:
    """Distance to the next partition's mean, each channel in units of that partition's deviation."""
    total = torch.zeros((), device=layer.key.device)
    for x in (layer.key, layer.value):
        tiles = _partitions(x, layer)
        mean, std = tiles[:, :, 1:].mean(dim=3, keepdim=True), tiles[:, :, 1:].std(dim=3, keepdim=True)
        total = total + _standardised(((tiles[:, :, :-1] - mean) / std.clamp_min(1e-12)).norm(dim=-1))
    return _each(total, layer)


def smooth3(layer: Layer) -> Tensor:
    """The cosine score averaged over 3 neighbours: literals are several tokens, and are of no use in pieces."""
    return _each(_smoothed(_cosine(layer), 3), layer)


def smooth5(layer: Layer) -> Tensor:
    """As `smooth3`, over 5."""
    return _each(_smoothed(_cosine(layer), 5), layer)


def smooth9(layer: Layer) -> Tensor:
    """As `smooth3`, over 9."""
    return _each(_smoothed(_cosine(layer), 9), layer)


def smooth5_global(layer: Layer) -> Tensor:
    """`smooth5` with one budget for all partitions of a head."""
    return _whole(_smoothed(_cosine(layer), 5), layer)


def floor(layer: Layer) -> Tensor:
    """A quarter of each partition's budget goes to evenly spaced tokens, the rest to the cosine score."""
    parts = _cosine(layer).clone()
    even = max(1, layer.keep // 4)
    places = torch.linspace(0, layer.lag_size - 1, even, device=parts.device).long()
    parts[..., places] = torch.inf
    return _each(parts, layer)


def _raw(layer: Layer, *, values: bool = True) -> Tensor:
    """Minus the cosine to the next partition's mean direction, as it is: a partition full of outliers stays one."""
    total = torch.zeros((), device=layer.key.device)
    for x in (layer.key, layer.value) if values else (layer.key,):
        direction = F.normalize(_partitions(x, layer), dim=-1)
        anchor = F.normalize(direction[:, :, 1:].mean(dim=3, keepdim=True), dim=-1)
        total = total - (direction[:, :, :-1] * anchor).sum(dim=-1)
    return total


def _shared(parts: Tensor, layer: Layer, share: float) -> Tensor:
    """A share of the budget for the best of each partition, the rest for the best of the head."""
    ranks = parts.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    sure = ranks < max(1, round(share * layer.keep))
    return _whole(torch.where(sure, torch.inf, parts), layer)


def raw_global(layer: Layer) -> Tensor:
    """The cosine without standardising, one budget for a head."""
    return _whole(_raw(layer), layer)


def raw_key_global(layer: Layer) -> Tensor:
    """As `raw_global`, keys only."""
    return _whole(_raw(layer, values=False), layer)


def raw_shared(layer: Layer) -> Tensor:
    """As `raw_global`, but a quarter of the budget is for the best of each partition."""
    return _shared(_raw(layer), layer, 0.25)


def raw_half_shared(layer: Layer) -> Tensor:
    """As `raw_shared`, with a half."""
    return _shared(_raw(layer), layer, 0.5)


def smooth3_raw_shared(layer: Layer) -> Tensor:
    """`raw_shared` over 3 neighbours."""
    return _shared(_smoothed(_raw(layer), 3), layer, 0.25)


def raw(layer: Layer) -> Tensor:
    """Keys and values added as they are, equally many tokens of each partition."""
    return _each(_raw(layer), layer)


def blend_quarter(layer: Layer) -> Tensor:
    """The cosine score and a quarter of the paper's statistic."""
    return _each(0.25 * _std(layer) + _cosine(layer), layer)


def small_keys(layer: Layer) -> Tensor:
    """The cosine score and half of what key norm says: small keys draw much attention."""
    return _each(
        0.5 * _standardised(-_partitions(layer.key, layer)[:, :, :-1].norm(dim=-1)) + _cosine(layer), layer
    )


def _lag_z(layer: Layer, *, larger: bool = False) -> Tensor:
    """Minus the cosine, in units of how the next partition's own tokens spread around their direction."""
    found = []
    for x in (layer.key, layer.value):
        direction = F.normalize(_partitions(x, layer), dim=-1)
        anchor = F.normalize(direction[:, :, 1:].mean(dim=3, keepdim=True), dim=-1)
        own = (direction[:, :, 1:] * anchor).sum(dim=-1)
        seen = (direction[:, :, :-1] * anchor).sum(dim=-1)
        found.append((own.mean(dim=-1, keepdim=True) - seen) / own.std(dim=-1, keepdim=True).clamp_min(1e-12))
    return torch.maximum(*found) if larger else found[0] + found[1]


def lag_z(layer: Layer) -> Tensor:
    """The cosine, standardised by the next partition in place of its own: lag-relative in its scale as well."""
    return _each(_lag_z(layer), layer)


def lag_z_larger(layer: Layer) -> Tensor:
    """As `lag_z`, the larger of keys and values: a token that is unusual in one of them is kept."""
    return _each(_lag_z(layer, larger=True), layer)


def lag_z_global(layer: Layer) -> Tensor:
    """As `lag_z`, one budget for a head."""
    return _whole(_lag_z(layer), layer)


def lag_z_shared(layer: Layer) -> Tensor:
    """As `lag_z_global`, but a quarter of the budget is for the best of each partition."""
    return _shared(_lag_z(layer), layer, 0.25)
