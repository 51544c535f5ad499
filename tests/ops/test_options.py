"""Blended scores, smoothing, one budget for a head and carried scores."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lagkv_ext
from lagkv_ext import reference
from tests.ops import blocks_properties, option_properties, properties, ragged_properties
from tests.ops.blocks_cases import blocks_cases
from tests.ops.cases import DTYPES, FINITE_KINDS, TRAPS, Case, cases, make_values
from tests.ops.ragged_cases import ragged_cases
from tests.ops.test_blocks_properties import TRAPS as BLOCKS_TRAPS
from tests.ops.test_ragged_properties import TRAPS as RAGGED_TRAPS

OPTIONS = {
    "blend": {"score": "blend"},
    "smooth": {"smooth": 3},
    "head": {"budget": "head"},
    "blend-smooth-head": {"score": "blend", "smooth": 5, "budget": "head"},
    "cosine-wide-head": {"score": "cosine", "smooth": 99, "budget": "head"},
}
CHECKS = (properties.check_lag_score, properties.check_staged, properties.check_in_place)


@given(case=cases(compresses=True, options=True))
def test_lag_score(backend, case):
    properties.check_lag_score(backend, case)


@given(case=cases(kinds=("normal", "offset"), compresses=True, options=True))
def test_lag_score_of_plain_values(backend, case):
    properties.check_lag_score(backend, case)


@given(case=cases(options=True))
def test_compress_is_its_stages(backend, case):
    properties.check_staged(backend, case)


@given(case=cases(kinds=FINITE_KINDS, compresses=True, options=True))
def test_compress_of_finite_values_is_its_stages(backend, case):
    properties.check_staged(backend, case)


@given(case=cases(expanded=False, options=True))
def test_in_place_equals_out_of_place(backend, case):
    properties.check_in_place(backend, case)


@given(case=cases(compresses=True, options=True))
def test_repeatable(backend, case):
    properties.check_repeatable(backend, case)


@given(case=cases(options=True), data=st.data())
def test_carried(backend, case, data):
    option_properties.check_carried(backend, case, data.draw(st.integers(0, case.start)))


@given(case=cases(expanded=False, options=True), data=st.data())
def test_carried_in_place(backend, case, data):
    option_properties.check_carried_in_place(backend, case, data.draw(st.integers(0, case.start)))


@pytest.mark.parametrize("check", ragged_properties.CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
@given(case=ragged_cases(options=True))
def test_ragged(backend, check, case):
    check(backend, case)


@given(case=blocks_cases(options=True))
def test_blocks(backend, case):
    blocks_properties.check_blocks(backend, case)


@given(case=ragged_cases(options=True), sink_size=st.integers(0, 14))
def test_slots_with_scores(backend, case, sink_size):
    option_properties.check_scored_slots(backend, case, sink_size)


@given(case=ragged_cases(options=True), sink_size=st.integers(0, 14))
def test_pages_with_scores(backend, case, sink_size):
    option_properties.check_scored_pages(backend, dataclasses.replace(case, shared=False), sink_size)


@given(case=ragged_cases(options=True), sink_size=st.integers(0, 14))
def test_as_many_rows_as_before(backend, case, sink_size):
    """``keep=0``, of slots and pages with carried scores."""
    case = dataclasses.replace(case, keep=0)
    option_properties.check_scored_slots(backend, case, sink_size)
    option_properties.check_scored_pages(backend, dataclasses.replace(case, shared=False), sink_size)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("trap", [name for name in TRAPS if not name.endswith("-cosine")])
def test_traps(backend, trap, option):
    case = dataclasses.replace(TRAPS[trap], **OPTIONS[option])
    for check in CHECKS:
        check(backend, case)
    for earlier in {0, min(2, case.start), case.start}:
        option_properties.check_carried(backend, case, earlier)
        option_properties.check_carried_in_place(backend, case, earlier)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("trap", RAGGED_TRAPS)
def test_ragged_traps(backend, trap, option):
    case = dataclasses.replace(RAGGED_TRAPS[trap], **OPTIONS[option])
    for check in ragged_properties.CHECKS:
        check(backend, case)
    option_properties.check_scored_slots(backend, case, 2)
    option_properties.check_scored_pages(backend, dataclasses.replace(case, shared=False), 2)


@pytest.mark.parametrize("option", [name for name in OPTIONS if "budget" not in OPTIONS[name]])
@pytest.mark.parametrize("trap", BLOCKS_TRAPS)
def test_blocks_traps(backend, trap, option):
    case = dataclasses.replace(BLOCKS_TRAPS[trap], **OPTIONS[option])
    blocks_properties.check_blocks(backend, case)


# Beyond the caches, and with enough work for several threads.
LARGE = Case(1, 2, 16 + 128 * 70 + 9, 128, 96, 16, 128, 32, torch.bfloat16, "offset", "normal")
SMALLER = dataclasses.replace(LARGE, length=16 + 128 * 18 + 9, key_dim=64, value_dim=32)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lag_size", [128, 1100])
def test_large_caches_with_any_threads(backend, lag_size, option):
    case = dataclasses.replace(SMALLER if backend.is_slow else LARGE, lag_size=lag_size, **OPTIONS[option])
    threads = torch.get_num_threads()
    try:
        for count in (1,) if backend.is_slow else (1, 2, 7):
            torch.set_num_threads(count)
            properties.check_staged(backend, case)
            properties.check_in_place(backend, case)
            option_properties.check_carried_in_place(backend, case, 7)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 2**16))
def test_chunks_carry_what_one_reading_scores(backend, dtype, cuts, seed):
    """A cache read in chunks holds the rows, and scores, that a recursion over one reading's scores chooses."""
    sink, lag_size, keep, tokens = 3, 8, 3, 300
    scoring = {"score": "blend", "smooth": 3}
    whole = [make_values("normal", (1, 2, tokens, dim), dtype, seed + dim) for dim in (16, 12)]
    score = backend.lag_score(*whole, sink, lag_size, **scoring).flatten(2)
    key, value = (x[:, :, :0] for x in whole)
    carried, seen = score[:, :, :0], torch.zeros(1, 2, 0, dtype=torch.long)
    edges = sorted({0, tokens, *cuts})
    for begin, end in itertools.pairwise(edges):
        key, value = (
            torch.cat([x, new[:, :, begin:end]], dim=2) for x, new in zip((key, value), whole, strict=True)
        )
        seen = torch.cat([seen, torch.arange(begin, end).expand(1, 2, -1)], dim=2)
        start = sink + carried.shape[2]
        key, value, index, carried = backend.compress_carried(
            key, value, carried, start, lag_size, keep, **scoring
        )
        seen = seen.gather(2, index.long())
    assert key.shape[2] == lagkv_ext.output_length(tokens, sink, lag_size, keep)
    middle = seen[:, :, sink : sink + carried.shape[2]] - sink
    option_properties.assert_equal_scores(carried, score.gather(2, middle), "scores")
    assert torch.equal(key, reference.compact(whole[0], seen))
    if len(edges) == 2:
        one = backend.compress(*whole, sink, lag_size, keep, **scoring, budget="head")
        assert torch.equal(one[2].long(), seen)


def test_defaults_are_the_papers(backend):
    """Bit for bit, named or not."""
    case = TRAPS["plain"]
    key, value = (p.view for p in case.make())
    sizes = case.start, case.lag_size, case.keep
    plain = backend.compress(key, value, *sizes)
    named = backend.compress(key, value, *sizes, score="std", smooth=1, budget="partition")
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))
    in_place = key.clone(), value.clone()
    index = backend.compress_(*in_place, *sizes, smooth=1, budget="partition", scores=None, sink_size=0)
    assert torch.equal(index, plain[2])
    assert torch.equal(in_place[0][:, :, : index.shape[2]], plain[0])


def test_python_functions_take_the_options():
    """A recursion by public functions alone: carried and in place give the same rows and scores."""
    whole = torch.randn(2, 1, 2, 400, 16, generator=torch.Generator().manual_seed(0))
    method = {"lag_size": 16, "keep": 4, "sink_size": 4, "score": "blend", "smooth": 3}
    first = lagkv_ext.compress_carried(*whole[:, :, :, :200], torch.empty(1, 2, 0), **method)
    grown = [torch.cat([x, new], dim=2) for x, new in zip(first[:2], whole[:, :, :, 200:], strict=True)]
    second = lagkv_ext.compress_carried(*grown, first.carried, **method)

    key, value = (x.clone() for x in whole)
    scores = torch.full((1, 2, 400), torch.nan)
    index = lagkv_ext.compress_(
        *(x[:, :, :200] for x in (key, value)), **method, budget="head", scores=scores[:, :, :200]
    )
    rows = index.shape[2]
    for x, old in zip((key, value), whole, strict=True):
        x[:, :, rows : rows + 200] = old[:, :, 200:]
    start = lagkv_ext.next_start(200, 4, 16, 4)
    grown_rows = slice(0, rows + 200)
    again = lagkv_ext.compress_(
        *(x[:, :, grown_rows] for x in (key, value)),
        **method, budget="head", scores=scores[:, :, grown_rows], start=start,
    )  # fmt: skip
    assert torch.equal(again, second.index)
    assert torch.equal(key[:, :, : again.shape[2]], second.key)
    after = 4 + second.carried.shape[2]
    assert torch.equal(scores[:, :, 4:after], second.carried)
    assert after == lagkv_ext.next_start(rows + 200, start, 16, 4)
    score = lagkv_ext.lag_score(*whole, lag_size=16, sink_size=4, score="blend", smooth=3)
    assert score.shape == (1, 2, 23, 16)
