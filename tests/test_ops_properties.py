"""Every operator on every backend, on whatever Hypothesis comes up with."""

from __future__ import annotations

import properties
import pytest
import torch
from cases import DTYPES, FINITE_KINDS, KINDS, TRAPS, Layout, cases, layouts, make_values, place
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("trap", TRAPS)
def test_trap(backend, trap):
    for check in properties.CASE_CHECKS:
        check(backend, TRAPS[trap])


@given(case=cases())
def test_partition_bounds(backend, case):
    properties.check_partition_bounds(backend, case)


@given(case=cases(compresses=True))
def test_lag_score(backend, case):
    properties.check_lag_score(backend, case)


@given(case=cases(kinds=("normal", "offset"), compresses=True))
def test_lag_score_of_plain_values(backend, case):
    properties.check_lag_score(backend, case)


@given(case=cases())
def test_compress(backend, case):
    properties.check_compress(backend, case)


@given(case=cases(kinds=FINITE_KINDS, compresses=True))
def test_compress_of_finite_values(backend, case):
    properties.check_compress(backend, case)


@given(case=cases())
def test_compress_is_its_stages(backend, case):
    properties.check_staged(backend, case)


@given(case=cases(expanded=False))
def test_in_place_equals_out_of_place(backend, case):
    properties.check_in_place(backend, case)


@given(case=cases(compresses=True))
def test_repeatable(kernel_backend, case):
    properties.check_repeatable(kernel_backend, case)


@st.composite
def scores(draw):
    """``[..., L]`` with ties, both zeros, NaN of both signs and infinities."""
    lag_size = draw(
        st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 255, 257, 1000, 1025, 2100]))
    )
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 1, 2, 2)]))
    kind = draw(st.sampled_from(("few", "signed_zeros", "huge", *KINDS)))
    dtype = draw(st.sampled_from(DTYPES))
    count = 1
    for n in leading:
        count *= n
    seed = draw(st.integers(0, 1 << 16))
    flat = (1, 1, count, lag_size)
    if kind in ("few", "signed_zeros"):
        x = make_values("normal", flat, dtype, seed).round()
        if kind == "signed_zeros":
            x = x.clamp(-0.5, 0.5).trunc()
    else:
        x = make_values(kind, flat, dtype, seed)
    pad = draw(st.integers(0, 3))
    rows = place(x, Layout(row_pad=pad, offset=pad)).view[0, 0]
    return rows.unflatten(0, leading) if leading else rows[0]


@given(score=scores(), data=st.data())
def test_topk_index(backend, score, data):
    keep = data.draw(st.integers(1, score.shape[-1]))
    properties.check_topk_index(backend, score.to(backend.device), keep)


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(
        st.integers(0, 3), st.integers(0, 3), st.integers(1, 70), st.sampled_from([1, 2, 3, 8, 33, 64, 128])
    ),
    count=st.integers(0, 90),
    layout=layouts(),
    index_layout=st.sampled_from(["contiguous", "transposed", "expanded"]),
    seed=st.integers(0, 1 << 16),
)
def test_compact(backend, kind, dtype, shape, count, layout, index_layout, seed):
    batch, heads, length, _ = shape
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, length, (batch, heads, count), generator=generator, dtype=torch.int32).to(
        backend.device
    )
    if index_layout == "transposed":
        index = index.transpose(1, 2).contiguous().transpose(1, 2)
    elif index_layout == "expanded" and heads:
        index = index[:, :1].expand(-1, heads, -1)
    placed = place(make_values(kind, shape, dtype, seed), layout, backend.device)
    properties.check_compact(backend, placed, index)
