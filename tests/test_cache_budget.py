"""The token budget of a cache: the rule by itself, the layer that follows it, and whole models under it."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.cache.budget import plan
from lagkv_ext.cache.settings import layer_settings


@st.composite
def budgets(draw):
    """Settings of a layer with a budget, from the least that is allowed on."""
    lag_size, sink_size = draw(st.integers(2, 9)), draw(st.integers(0, 5))
    return layer_settings(
        lag_size=lag_size,
        keep=draw(st.integers(1, lag_size - 1)),
        keep_ratio=None,
        sink_size=sink_size,
        value_weight=1.0,
        score="std",
        order=draw(st.sampled_from(["use_then_compress", "compress_then_use"])),
        max_tokens=sink_size + 2 * lag_size + draw(st.integers(0, 40)),
    )


# -- the rule


@given(
    settings=budgets(), steps=st.lists(st.one_of(st.just(1), st.integers(1, 200)), min_size=1, max_size=60)
)
def test_any_steps_stay_within_the_budget(settings, steps):
    rows, start = 0, settings.sink_size
    for new in [*steps, *[1] * 150]:
        before = rows + new
        planned = plan(settings, before, start)
        if new == 1:
            assert before <= settings.max_tokens
            assert len(planned.passes) <= 1
        at = before
        for one in planned.passes:
            assert one.rows == at
            assert one.start in (start, settings.sink_size)
            assert one.count == settings.compressed_count(one.rows, one.start) > 0
            at -= one.count * (settings.lag_size - settings.keep)
            start = one.start + one.count * settings.keep
        rows = planned.rows
        assert rows == at < settings.max_tokens
        assert planned.start in (start, settings.sink_size)
        # Either the next compression comes in time, or all that is held is up for it.
        start = planned.start
        assert start + 2 * settings.lag_size <= settings.max_tokens
    assert rows >= settings.lag_size


def test_a_budget_just_large_enough_rescoring_what_was_kept():
    """4 sink rows, partitions of 8 of which 2 stay, 20 rows: all of it in numbers."""
    settings = layer_settings(
        lag_size=8,
        keep=2,
        keep_ratio=None,
        sink_size=4,
        value_weight=1.0,
        score="std",
        order="use_then_compress",
        max_tokens=20,
    )
    rows, start, lengths = 0, 4, []
    for _ in range(40):
        planned = plan(settings, rows + 1, start)
        lengths.append((planned.rows, planned.start, len(planned.passes)))
        rows, start = planned.rows, planned.start
    assert [i for i, x in enumerate(lengths) if x[2]] == [19, 25, 31, 37]
    assert {x[:2] for x in lengths if x[2]} == {(14, 4)}
