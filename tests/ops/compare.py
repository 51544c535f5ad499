"""The tolerance policy: what a backend's scores and selection may differ in, and nothing else may differ at all.

The yardstick is the reference in float64 on the same stored values. A score may be off by twice what plain PyTorch in
the operator's own arithmetic is off in the same partition, plus what the roundings on the way of one element to its
score come to: plain PyTorch, whose deviation adds up in double, is off by next to nothing where a partition holds a
handful of numbers and one of them is large. At size, ``test_large`` allows the two times and nothing else. A selection
may differ from the yardstick's only among tokens whose scores those tolerances cannot tell apart.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lagkv_ext import reference
from lagkv_ext.formulas import arithmetic_dtype, compressed_count
from tests.ops.cases import bits

FACTOR = 2.0  # of plain PyTorch's own error
# Units of eps, two roundings each. std: difference, reciprocal, product; mean, sum of squares, root.
FLOOR = {"std": 3.0, "cosine": 1.0, "blend": 3.0}
# The arithmetic squares: beyond this, or below its inverse, it has no answer to compare.
RANGE = {torch.float32: 1e18, torch.float64: 1e150}


@dataclasses.dataclass(frozen=True)
class Band:
    """Scores ``[B, H, P-1, L]`` that a correct backend may return."""

    exact: Tensor  #: float64
    plain_error: Tensor  #: what plain PyTorch is off
    tolerance: Tensor  #: inf where the arithmetic cannot tell
    nan: Tensor  #: the score must be NaN
    number: (
        Tensor  #: it must not be, also where the tolerance is infinite (equal statistics: z = 0, not 0 / 0)
    )

    @property
    def lower(self) -> Tensor:
        bound = torch.where(self.tolerance.isinf(), -math.inf, self.exact - self.tolerance)
        return torch.where(self.nan, math.inf, bound)

    @property
    def upper(self) -> Tensor:
        bound = torch.where(self.tolerance.isinf(), math.inf, self.exact + self.tolerance)
        return torch.where(self.nan, math.inf, bound)


def score_band(
    key: Tensor, value: Tensor, start: int, lag_size: int, value_weight: float, score: str, smooth: int = 1
) -> Band:
    scoring = {"value_weight": value_weight, "score": score, "smooth": smooth}
    exact = reference.lag_score(key.double(), value.double(), start, lag_size, **scoring)
    if key.dtype == torch.float64:  # the same sums in another order: what float64 itself is off
        plain = reference.lag_score(key.flip(-1), value.flip(-1), start, lag_size, **scoring)
    else:
        plain = reference.lag_score(key, value, start, lag_size, **scoring).double()

    eps = torch.finfo(arithmetic_dtype(key.dtype)).eps
    tiny = torch.finfo(arithmetic_dtype(key.dtype)).smallest_normal
    rounding = {"std": _std_rounding, "cosine": _cosine_rounding, "blend": _blend_rounding}[score]
    limit = RANGE[arithmetic_dtype(key.dtype)]
    key_rounding, key_known = rounding(_tiles(key, start, lag_size), limit)
    value_rounding, value_known = rounding(_tiles(value, start, lag_size), limit)
    floor = FLOOR[score] * eps * (key_rounding + abs(value_weight) * value_rounding + exact.abs()) + tiny
    known = key_known & value_known
    if smooth > 1 and floor.numel():  # of what lies around a token the worst; and a unit for each sum
        alone = reference.lag_score(key.double(), value.double(), start, lag_size, **scoring | {"smooth": 1})
        sums = eps * min(smooth, lag_size) * alone.nan_to_num(0.0).abs()
        floor = (floor.nan_to_num(math.inf) + sums).amax(-1, keepdim=True).expand_as(floor)
        known = known.all(-1, keepdim=True).expand_as(known)

    known = known & (exact.isnan() == plain.isnan())
    error = (plain - exact).abs()
    worst = torch.where(known & ~exact.isnan(), error, 0.0)
    worst = worst.amax(-1, keepdim=True) if worst.numel() else worst
    tolerance = torch.where(known, FACTOR * worst + floor.nan_to_num(math.inf), math.inf)
    return Band(exact, error, tolerance, exact.isnan() & known, ~exact.isnan() & known)


def assert_scores(actual: Tensor, band: Band) -> None:
    """``actual`` is within the band everywhere."""
    assert actual.shape == band.exact.shape, (
        f"scores have shape {tuple(actual.shape)}, not {tuple(band.exact.shape)}"
    )
    actual = actual.cpu().double()
    missing = band.nan & ~actual.isnan()
    assert not missing.any(), f"score of {_first(missing)} is {actual[missing][0]} and must be NaN"
    lost = band.number & actual.isnan()
    assert not lost.any(), f"score of {_first(lost)} is NaN, exactly {band.exact[lost][0]:.9g}"
    judged = band.tolerance.isfinite() & ~band.nan
    error = (actual - band.exact).abs()
    bad = judged & ~(error <= band.tolerance)
    assert not bad.any(), (
        f"score of {_first(bad)} is {actual[bad][0]:.9g}, exactly {band.exact[bad][0]:.9g}: off by "
        f"{error[bad][0]:.3g}, allowed {band.tolerance[bad][0]:.3g}; {int(bad.sum())} of {bad.numel()} are off by more"
    )


def assert_selection(index: Tensor, band: Band, length: int, start: int, lag_size: int, keep: int) -> None:
    """``index [B, H, N']``: prefix and window exact, ``keep`` of every partition, nothing surely better left out."""
    kept = kept_mask(index, length, start, lag_size, keep)
    if not kept.numel():
        return
    _assert_best(kept, band.lower, band.upper, band.nan, band.nan | band.tolerance.isfinite())


def _assert_best(kept: Tensor, lower: Tensor, upper: Tensor, nan: Tensor, known: Tensor) -> None:
    worst_kept = torch.where(kept, upper, math.inf).amin(-1)
    best_left = torch.where(kept, -math.inf, lower).amax(-1)
    bad = best_left > worst_kept
    assert not bad.any(), (
        f"in partition {_first(bad)} a token was left out whose score is higher than a kept one's"
    )
    # NaN ranks highest, and among NaN the lower position.
    nan_left_before = (nan & ~kept).cumsum(-1) > 0
    bad = kept & nan_left_before & known
    assert not bad.any(), f"token {_first(bad)} was kept and a NaN score at a lower position was not"


def assert_head_selection(
    index: Tensor,
    band: Band,
    carried: Tensor,
    length: int,
    start: int,
    keep: int,
    after: Tensor | None = None,
) -> None:
    """``index [B, H, N']`` of ``budget="head"``, whose rows before ``start`` bring the scores ``carried [B, H, C]``:
    nothing surely better left out. ``after``: the next carried scores, those of the kept rows."""
    batch, heads, compressed, lag_size = band.exact.shape
    sink, window = start - carried.shape[2], start + compressed * lag_size
    index, carried = index.cpu().long(), carried.cpu().double()
    if compressed == 0:
        assert torch.equal(index, torch.arange(length).expand_as(index)), "index is not the identity"
        return
    places = carried.shape[2] + keep * compressed
    assert index.shape == (batch, heads, sink + places + length - window), f"index has shape {index.shape}"
    ends = torch.cat([torch.arange(sink), torch.arange(window, length)])
    outside = torch.cat([index[..., :sink], index[..., sink + places :]], dim=2)
    assert torch.equal(outside, ends.expand_as(outside)), "the sink or the window is not whole"
    chosen = index[..., sink : sink + places] - sink
    assert (chosen.diff(dim=-1) > 0).all(), "index does not ascend"
    assert not chosen.numel() or (chosen.min() >= 0 and chosen.max() < window - sink), (
        "index leaves the rivals"
    )
    kept = torch.zeros(batch, heads, window - sink, dtype=torch.bool).scatter(2, chosen, True)
    exact = carried.masked_fill(carried.isnan(), math.inf)
    lower, upper = (torch.cat([exact, x.flatten(2)], dim=2) for x in (band.lower, band.upper))
    nan = torch.cat([carried.isnan(), band.nan.flatten(2)], dim=2)
    known = torch.cat(
        [torch.ones_like(carried, dtype=torch.bool), band.tolerance.isfinite().flatten(2)], dim=2
    )
    if kept.numel():
        _assert_best(kept, lower, upper, nan, known | nan)
    if after is not None:
        score = after.cpu().double().nan_to_num(math.inf, math.inf, -math.inf)
        within = (score >= lower.gather(2, chosen)) & (score <= upper.gather(2, chosen))
        assert within.all(), f"score {_first(~within)} of a kept row is not its own"


def kept_mask(index: Tensor, length: int, start: int, lag_size: int, keep: int) -> Tensor:
    """``[B, H, P-1, L]`` of what ``index`` keeps, after asserting all about it that does not depend on scores."""
    assert index.dtype == torch.int32, f"index is {index.dtype}, not int32"
    index = index.cpu().long()
    batch, heads, rows = index.shape
    count = max(0, (length - start) // lag_size - 1)
    window = start + count * lag_size
    if count == 0:
        assert torch.equal(index, torch.arange(length).expand(batch, heads, length)), (
            "index is not the identity"
        )
        return torch.zeros(batch, heads, 0, lag_size, dtype=torch.bool)
    assert rows == start + count * keep + length - window, f"index has {rows} rows"
    assert torch.equal(index[..., :start], torch.arange(start).expand(batch, heads, start)), (
        "the sink is not whole"
    )
    tail = torch.arange(window, length).expand(batch, heads, length - window)
    assert torch.equal(index[..., start + count * keep :], tail), "the window is not whole"
    inner = index[..., start : start + count * keep].unflatten(2, (count, keep)) - start
    inner = inner - lag_size * torch.arange(count)[:, None]
    bad = (inner < 0) | (inner >= lag_size)
    assert not bad.any(), f"index {_first(bad)} is {int(inner[bad][0])} in a partition of {lag_size}"
    assert (inner.diff(dim=-1) > 0).all(), "index does not ascend"
    return torch.zeros(batch, heads, count, lag_size, dtype=torch.bool).scatter(3, inner, True)


def assert_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same shape, dtype, device and bits; NaN payloads and signs of zero included."""
    assert actual.shape == expected.shape, (
        f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{what} is {actual.dtype}, not {expected.dtype}"
    assert actual.device == expected.device, f"{what} is on {actual.device}, not {expected.device}"
    different = bits(actual) != bits(expected)
    assert not different.any(), (
        f"{what} differs at {_first(different)}: {actual[different][0]} and not {expected[different][0]}; "
        f"{int(different.sum())} of {different.numel()} elements differ"
    )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def _tiles(x: Tensor, start: int, lag_size: int) -> Tensor:
    """Full partitions in float64; ``[B, H, 1, L, D]`` or less where nothing is compressed."""
    count = compressed_count(x.shape[2], start, lag_size) + 1
    rows = x[:, :, start : start + count * lag_size].double()
    if rows.shape[2] < count * lag_size:
        return x.new_zeros((*x.shape[:2], 1, lag_size, x.shape[3]), dtype=torch.float64)
    return rows.unflatten(2, (count, lag_size))


def _std_rounding(tiles: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """First-order rounding bound of the softmax of s, in units of eps, and where the arithmetic has an answer.

    An error of eps in every y moves s by at most eps times the channels' root mean square r; the softmax p then moves
    by p (r + sum p r), plus a unit for its own rounding.
    """
    lo, hi = tiles[:, :, 1:].amin(dim=3, keepdim=True), tiles[:, :, 1:].amax(dim=3, keepdim=True)
    y = torch.where(hi == lo, 0.0, (tiles[:, :, :-1] - lo) / (hi - lo))
    r = y.square().mean(dim=-1).sqrt()
    s = y.std(dim=-1) if y.shape[-1] > 1 else torch.zeros_like(r)
    p = s.softmax(dim=-1)
    return p * (1 + r + (p * r).sum(dim=-1, keepdim=True)), ~(r > limit)


def _cosine_rounding(tiles: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """As :func:`_std_rounding` for z = (s - mean) / std of s = -cos(x, a), an error of which moves z by that over the
    deviation.
    """
    s, rounding, known = _direction_rounding(tiles, limit)
    if s.shape[-1] == 1:
        return torch.zeros_like(s), torch.ones_like(s, dtype=torch.bool)
    deviation = s.std(dim=-1, keepdim=True)
    z = (s - s.mean(dim=-1, keepdim=True)) / deviation
    return (1 + z.abs()) * (1 + rounding / deviation), known


def _blend_rounding(tiles: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """As :func:`_std_rounding` for s + L p."""
    std, std_known = _std_rounding(tiles, limit)
    _, rounding, known = _direction_rounding(tiles, limit)
    return tiles.shape[3] * std + rounding, std_known & known


def _direction_rounding(tiles: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """s = -cos(x, a), its rounding bound eps (1 + 1 / |a|), as the mean direction a of rows that point everywhere is
    short, and where the arithmetic has an answer.
    """
    norm = tiles.norm(dim=-1, keepdim=True)
    direction = torch.where(norm == 0, 0.0, tiles / norm)
    anchor = direction[:, :, 1:].mean(dim=3)
    length = anchor.norm(dim=-1, keepdim=True)  # [B, H, P-1, 1]
    s = -(direction[:, :, :-1] * anchor.unsqueeze(3)).sum(-1) / length
    s = torch.where(length == 0, 0.0, s)
    in_range = ((norm == 0) | ((norm > 1 / limit) & (norm < limit)) | norm.isnan() | norm.isinf())[
        ..., 0
    ].all(dim=-1)
    known = (in_range[:, :, :-1] & in_range[:, :, 1:]).unsqueeze(-1).expand_as(s)
    return s, (1 + 1 / length).expand_as(s), known
