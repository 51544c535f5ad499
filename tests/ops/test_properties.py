"""Every operator on every backend, on whatever Hypothesis comes up with."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops import properties
from tests.ops.cases import DTYPES, FINITE_KINDS, KINDS, Layout, cases, layouts, make_values, place


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
    """``[..., L]`` and a layout: with ties, both zeros, infinities, few and many NaN of both signs."""
    lag_size = draw(
        st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 255, 257, 1000, 1025, 2100]))
    )
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 1, 2, 2)]))
    kind = draw(st.sampled_from(("few", "signed_zeros", "many_nan", *KINDS)))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1 << 16))
    shape = (1, 1, math.prod(leading), lag_size)
    x = make_values(kind if kind in KINDS else "normal", shape, dtype, seed)
    if kind == "few":
        x = x.round()
    elif kind == "signed_zeros":
        x = x.clamp(-0.5, 0.5).trunc()
    elif kind == "many_nan":
        x = torch.where(x.abs() < 0.5, x / 0 * 0, x.round())  # the sign of the NaN is the machine's choice
        x = torch.where(x.isnan() & (torch.arange(lag_size) % 2 == 0), -x, x)
    pad = draw(st.integers(0, 3))
    return x, leading, Layout(row_pad=pad, offset=pad)


@given(drawn=scores(), data=st.data())
def test_topk_index(backend, drawn, data):
    x, leading, layout = drawn
    rows = place(x, layout, backend.device).view[0, 0]
    score = rows.unflatten(0, leading) if leading else rows[0]
    keep = data.draw(st.integers(1, score.shape[-1]))
    properties.check_topk_index(backend, score, keep)


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
