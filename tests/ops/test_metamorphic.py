"""Results that must not change, or must change in a known way, when the input does; needs no reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lagkv_ext
from tests.ops.cases import DTYPES, FINITE_KINDS, Layout, bits, cases, make_values
from tests.ops.compare import assert_bits, assert_scores, score_band
from tests.ops.properties import band_of, rows

COMPRESSED = cases(kinds=FINITE_KINDS, compresses=True)


@given(case=cases(kinds=("normal", "constant", "ties"), compresses=True), seed=st.integers(0, 99))
def test_scaling_channels_by_powers_of_two_changes_no_std_score(backend, case, seed):
    """Bit for bit: normalisation takes the scale out, and powers of two are exact (upwards: no float16 gets lost)."""
    case = dataclasses.replace(case, score="std")
    key, value = (placed.view for placed in case.make(backend.device))
    power = torch.randint(0, 6, (case.key_dim,), generator=torch.Generator().manual_seed(seed))
    scale = (2.0**power).to(key)
    key = key.contiguous()  # as the product is: on CUDA the layout decides the order of a sum
    expected = backend.lag_score(key, value, case.start, case.lag_size, **case.scoring)
    scaled = backend.lag_score(key * scale, value, case.start, case.lag_size, **case.scoring)
    assert_bits(scaled, expected, "score")


@given(case=cases(kinds=("ties", "constant"), dtypes=(torch.float32, torch.float64), compresses=True))
def test_shifting_channels_changes_std_scores_by_rounding_only(backend, case):
    """Small integers stay exact when an integer is added, and the reference has no other answer for them."""
    case = dataclasses.replace(case, score="std")
    key, value = (placed.view.round() for placed in case.make(backend.device))
    shifted = key + 100.0 * torch.arange(case.key_dim, device=key.device)
    actual = backend.lag_score(shifted, value, case.start, case.lag_size, **case.scoring)
    unshifted = score_band(key.cpu(), value.cpu(), case.start, case.lag_size, case.value_weight, case.score)
    band = score_band(shifted.cpu(), value.cpu(), case.start, case.lag_size, case.value_weight, case.score)
    assert torch.equal(unshifted.exact.nan_to_num(-1), band.exact.nan_to_num(-1))
    assert_scores(actual, band)


@given(case=COMPRESSED, power=st.integers(-4, 4))
def test_length_of_a_row_changes_no_cosine_score(backend, case, power):
    case = dataclasses.replace(
        case, score="cosine", key_kind="normal", value_kind="outliers", dtype=torch.float32
    )
    key, value = (placed.view for placed in case.make(backend.device))
    scale = 2.0 ** (torch.arange(case.length, device=key.device) % 5 + power)
    actual = backend.lag_score(key * scale[:, None], value, case.start, case.lag_size, **case.scoring)
    assert_scores(actual, band_of(case))


@given(case=COMPRESSED, data=st.data())
def test_heads_and_batch_are_independent(backend, case, data):
    """Permuted in, permuted out; and one head alone gives what it gives among others."""
    key, value = (placed.view for placed in case.make(backend.device))
    arguments = (case.start, case.lag_size, case.keep)
    expected = backend.compress(key, value, *arguments, **case.scoring)
    heads = list(data.draw(st.permutations(range(case.heads))))
    batch = list(data.draw(st.permutations(range(case.batch))))
    permuted = backend.compress(key[batch][:, heads], value[batch][:, heads], *arguments, **case.scoring)
    for name, actual, original in zip(("key", "value", "index"), permuted, expected, strict=True):
        assert_bits(actual, original[batch][:, heads], name)
    b, h = batch[0], heads[0]
    alone = backend.compress(
        key[b : b + 1, h : h + 1], value[b : b + 1, h : h + 1], *arguments, **case.scoring
    )
    for name, actual, original in zip(("key", "value", "index"), alone, expected, strict=True):
        assert_bits(actual, original[b : b + 1, h : h + 1], name)


@given(case=cases(kinds=("normal", "offset", "ties"), compresses=True, expanded=False))
def test_layout_changes_nothing(backend, case):
    """The same values in another layout give the same bits (CUDA: the same up to the order of a sum)."""
    dense = dataclasses.replace(case, key_layout=Layout(), value_layout=Layout())
    expected, actual = (
        backend.lag_score(
            *(placed.view for placed in which.make(backend.device)), case.start, case.lag_size, **case.scoring
        )
        for which in (dense, case)
    )
    if backend.sums_by_alignment:
        assert_scores(actual, band_of(dense))
    else:
        assert_bits(actual, expected, "score")


@given(case=COMPRESSED, data=st.data())
def test_a_longer_remainder_changes_nothing_before_it(backend, case, data):
    key, value = (placed.view for placed in case.make(backend.device))
    full = case.length - (case.length - case.start) % case.lag_size
    shorter = data.draw(st.integers(full, case.length))
    arguments = (case.start, case.lag_size, case.keep)
    expected = backend.compress(key, value, *arguments, **case.scoring)
    cut = backend.compress(key[:, :, :shorter], value[:, :, :shorter], *arguments, **case.scoring)
    for name, actual, original in zip(("key", "value", "index"), cut, expected, strict=True):
        assert_bits(actual, original[:, :, : actual.shape[2]], name)
        assert original.shape[2] - actual.shape[2] == case.length - shorter


@given(case=COMPRESSED)
def test_the_sink_is_not_looked_at(backend, case):
    """Neither are, by the std score, tokens before the partition: dropping the sink only moves positions."""
    key, value = (placed.view for placed in case.make(backend.device))
    expected = backend.compress(key, value, case.start, case.lag_size, case.keep, **case.scoring)
    without = [x[:, :, case.start :] for x in (key, value)]
    actual = backend.compress(*without, 0, case.lag_size, case.keep, **case.scoring)
    for name, mine, original in zip(("key", "value"), actual, expected, strict=False):
        assert_bits(mine, original[:, :, case.start :], name)
    assert_bits(actual[2] + case.start, expected[2][:, :, case.start :], "index")


@given(case=cases())
def test_keep_all_is_the_identity(backend, case):
    key, value = (placed.view for placed in case.make(backend.device))
    new_key, new_value, index = backend.compress(
        key, value, case.start, case.lag_size, case.lag_size, **case.scoring
    )
    assert_bits(new_key, key, "key")
    assert_bits(new_value, value, "value")
    assert torch.equal(index.cpu(), torch.arange(case.length, dtype=torch.int32).expand(index.shape))


@given(case=cases(), past=st.integers(0, 1000))
def test_a_start_past_the_last_partition_is_the_identity(backend, case, past):
    key, value = (placed.view for placed in case.make(backend.device))
    start = max(0, case.length - 2 * case.lag_size + 1) + past
    new_key, new_value, index = backend.compress(key, value, start, case.lag_size, case.keep, **case.scoring)
    assert_bits(new_key, key, "key")
    assert_bits(new_value, value, "value")
    assert torch.equal(index.cpu(), torch.arange(case.length, dtype=torch.int32).expand(index.shape))


@given(case=COMPRESSED)
def test_compressing_again_from_the_next_start_changes_nothing(backend, case):
    key, value = (placed.view for placed in case.make(backend.device))
    key, value, _ = backend.compress(key, value, case.start, case.lag_size, case.keep, **case.scoring)
    start = lagkv_ext.next_start(case.length, case.start, case.lag_size, case.keep)
    assert key.shape[2] - start < 2 * case.lag_size
    again = backend.compress(key, value, start, case.lag_size, case.keep, **case.scoring)
    assert_bits(again[0], key, "key")
    assert_bits(again[1], value, "value")


@given(case=COMPRESSED, seed=st.integers(0, 99))
def test_weight_zero_looks_at_keys_alone(backend, case, seed):
    case = dataclasses.replace(case, value_weight=0.0, value_kind="normal")
    key, value = (placed.view for placed in case.make(backend.device))
    other = make_values("offset", tuple(value.shape), case.dtype, seed).to(backend.device)
    arguments = (case.start, case.lag_size, case.keep)
    index = backend.compress(key, value, *arguments, **case.scoring)[2]
    assert_bits(backend.compress(key, other, *arguments, **case.scoring)[2], index, "index")


@given(case=cases(kinds=("normal", "offset"), compresses=True))
def test_key_and_value_change_places(backend, case):
    """At weight 1 the sum of the two scores is the same sum."""
    key, value = (placed.view for placed in case.make(backend.device))
    expected = backend.lag_score(key, value, case.start, case.lag_size, score=case.score)
    assert_bits(backend.lag_score(value, key, case.start, case.lag_size, score=case.score), expected, "score")


@given(case=cases(compresses=True))
def test_reversed_rows_are_undone_by_compact(backend, case):
    key, _ = (placed.view for placed in case.make(backend.device))
    index = torch.arange(case.length - 1, -1, -1, dtype=torch.int32, device=key.device)
    index = index.expand(case.batch, case.heads, -1)
    assert_bits(backend.compact(backend.compact(key, index), index), rows(key, index.flip(-1)), "key")
    assert torch.equal(bits(backend.compact(key, index)), bits(key.contiguous()).flip(2))


@given(
    dim=st.sampled_from((1, 3, 8, 64, 80, 257)),
    lag_size=st.integers(2, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_equal_rows_have_a_cosine_score_of_exactly_zero(backend, dim, lag_size, dtype, seed):
    """Their statistics are equal, and a deviation of 0 is no matter of rounding."""
    row = torch.randn(1, 1, 1, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = row.expand(1, 1, 3 * lag_size, dim).contiguous().to(backend.device)
    score = backend.lag_score(x, x, 0, lag_size, score="cosine")
    assert torch.equal(score, torch.zeros_like(score))


@pytest.mark.parametrize("dim", [3, 8, 64, 257])
def test_a_norm_beyond_the_arithmetic_leaves_a_number(backend, dim):
    """A row of finite channels whose squares overflow is divided to 0 (x / inf): its score is low, not NaN."""
    key = make_values("normal", (1, 1, 4 * 16, dim), torch.float32, 0)
    key[:, :, 5] = 1e30
    key[:, :, 20] = -1e30
    key = key.to(backend.device)
    assert not backend.lag_score(key, key, 0, 16, score="cosine").isnan().any()


@pytest.mark.parametrize("dim", [3, 8, 64, 257])
def test_bounds_far_below_the_values_leave_numbers(backend, dim):
    """The sum of squares of y is beyond the arithmetic, its deviation is not: a score is a number."""
    key = make_values("normal", (1, 1, 3 * 16, dim), torch.float32, 0)
    key[:, :, 16:] *= 1e-25
    score = backend.lag_score(key.to(backend.device), key.to(backend.device), 0, 16)
    band = score_band(key, key, 0, 16, 1.0, "std")
    assert not band.exact.isnan().any()
    assert not score.isnan().any()
    assert_scores(score, band)
