"""The token budget of a cache: the rule by itself, the layer that follows it, and whole models under it."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import LagKVCache
from lagkv_ext.cache.compression.plan import plan
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.settings import layer_settings
from tests.cache.models import (
    KINDS,
    SMALL,
    Oracle,
    OracleLayer,
    forward,
    full_layers,
    generate,
    prompt,
    tiny_config,
    tiny_model,
)
from tests.cache.record import Record, states


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def budgets(draw):
    """Settings of a layer with a token budget, from the least that is allowed on."""
    lag_size, sink_size = draw(st.integers(2, 9)), draw(st.integers(0, 5))
    keep, shared = draw(st.integers(1, lag_size - 1)), draw(st.sampled_from(["partition", "head"]))
    least = sink_size + 2 * lag_size + (keep if shared == "head" else 0)
    # In smaller partitions all tokens, or those of all partitions, have one score but for rounding: a softmax adds up
    # to 1, and two standardised numbers are always the same.
    smooth = draw(st.sampled_from([1, 3])) if lag_size > 3 else 1
    scores = ["std", "cosine", "blend"] if lag_size > 2 else ["std", "blend"]
    return layer_settings(
        lag_size=lag_size,
        keep=keep,
        keep_ratio=None,
        sink_size=sink_size,
        value_weight=draw(st.sampled_from([1.0, 0.5])),
        score=draw(st.sampled_from(scores)),
        smooth=smooth,
        budget=shared,
        max_tokens=least + draw(st.integers(0, 40)),
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
            at -= one.count * (settings.lag_size - settings.keep) + one.shed
            start = one.start + one.count * settings.keep - one.shed
            assert one.shed >= 0
            assert one.shed == 0 or settings.budget == "head"
        rows = planned.rows
        assert rows == at < settings.max_tokens
        assert planned.start in (start, settings.sink_size)
        # Either the next compression comes in time, or all that is held is up for it.
        assert settings.budget == "partition" or planned.start == start
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
        max_tokens=20,
    )
    rows, start, lengths = 0, 4, []
    for _ in range(40):
        planned = plan(settings, rows + 1, start)
        lengths.append((planned.rows, planned.start, len(planned.passes)))
        rows, start = planned.rows, planned.start
    assert [i for i, x in enumerate(lengths) if x[2]] == [19, 25, 31, 37]
    assert {x[:2] for x in lengths if x[2]} == {(14, 4)}


# -- a layer


@given(
    settings=budgets(),
    steps=st.lists(st.one_of(st.just(1), st.integers(1, 100)), min_size=1, max_size=12),
    decode=st.integers(0, 120),
)
def test_rows_and_positions_after_any_number_of_restarts(settings, steps, decode):
    layer, record = LagKVLayer(settings), Record(settings)
    for i, new in enumerate([*steps, *[1] * decode]):
        columns, offset = layer.get_mask_sizes(new)
        assert offset + columns == layer.seen + new
        key, value = states(new, seed=i)
        held = record.append(key, value)
        returned = layer.update(key, value)
        assert returned[0].shape[2] == returned[1].shape[2] == columns
        assert torch.equal(returned[0], held[0])
        assert torch.equal(returned[1], held[1])
        assert layer.rows == record.length < settings.max_tokens
        if i % 7 == 0 or i >= len(steps) + decode - 3:
            assert torch.equal(layer.kept_positions(), record.rows[2])
            assert torch.equal(layer.keys, record.rows[0])
            assert torch.equal(layer.values, record.rows[1])


@given(
    settings=budgets(),
    steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 7)), min_size=1, max_size=25),
)
def test_rejected_tokens_leave_no_trace(settings, steps):
    layer, record = LagKVLayer(settings), Record(settings)
    layer.activate_past_recording()
    for i, (accepted, rejected) in enumerate(steps):
        key, value = states(accepted + rejected, seed=i)
        layer.update(key, value)
        layer.crop(-rejected)
        record.append(key[:, :, :accepted], value[:, :, :accepted])
        assert torch.equal(layer.kept_positions(), record.rows[2])
        assert torch.equal(layer.keys, record.rows[0])


def small_layer(**changes):
    settings = {
        "lag_size": 8,
        "keep": 2,
        "keep_ratio": None,
        "sink_size": 4,
        "value_weight": 1.0,
        "score": "std",
    }
    return LagKVLayer(layer_settings(**{**settings, "max_tokens": 30, **changes}))


def test_crop_after_a_restart_removes_recent_tokens_alone():
    """Rows past ``start`` are not all recent then: those that an earlier compression chose are among them."""
    layer = small_layer()
    record = Record(layer.settings)
    for i in range(200):
        layer.update(*states(1, seed=i))
        record.append(*states(1, seed=i))
        if record.restarts and record.start == 4 and record.length >= 4 + 2 * 8:
            break
    else:
        pytest.fail("no restart is pending")
    last = torch.arange(record.seen - record.length, record.seen)
    recent = int((record.rows[2] == last).all(dim=1).all(dim=0).long().flip(0).cumprod(0).sum())
    allowed = 8  # one partition: the restart comes with a compression, which leaves no remainder
    assert allowed <= recent < layer.rows - layer.tracks[0].start
    with pytest.raises(ValueError, match=f"only the last {allowed} of the"):
        layer.crop(-allowed - 1)
    layer.crop(-allowed)
    record.crop(allowed)
    assert torch.equal(layer.kept_positions(), record.rows[2])
    for i in range(60):
        layer.update(*states(1, seed=i))
        record.append(*states(1, seed=i))
    assert torch.equal(layer.kept_positions(), record.rows[2])


def test_memory_is_constant_for_ever():
    layer, held = small_layer(max_tokens=40), set()
    for i in range(3000):
        layer.update(*states(1, seed=i))
        if i > 200:
            held.add(tuple(x.shape[2] for x in layer.storages()[:2]))
            assert layer.storages()[2].shape[2] < 40
    assert held == {(40, 40)}
    assert layer.seen == 3000


# -- a model


@pytest.mark.parametrize("kind", KINDS)
def test_attention_under_a_budget_sees_exactly_the_kept_rows(kind):
    """A prompt of more than the budget, then single tokens and chunks."""
    model, chunks = tiny_model(kind, "sdpa", torch.float64), [100, *[1] * 60, 9, 30, *[1] * 30]
    ids = prompt(sum(chunks), batch=2)
    cache = LagKVCache(model.config, keep=2, max_tokens=28, **SMALL)
    layers = {i: OracleLayer(keep=2, max_tokens=28, **SMALL) for i in full_layers(kind)}
    expected = Oracle(kind, layers).forward(ids, chunks)
    torch.testing.assert_close(forward(model, cache, ids, chunks), expected, rtol=1e-9, atol=1e-9)
    for i, layer in layers.items():
        assert torch.equal(cache.kept_positions(i).long(), layer.positions)
        assert cache.report().layers[i].compressions == layer.compressions > 12
        assert cache.report().layers[i].tokens_kept < 28


def test_a_budget_does_not_bind_what_is_not_compressed():
    model = tiny_model("gemma3")
    cache = LagKVCache(model.config, keep=2, max_tokens=20, skip_layers=[1], **SMALL)
    generate(model, prompt(50), cache, new=30)
    assert [x.tokens_kept for x in cache.report().layers] == [11, 79, 11, cache.layers[3].rows]
    assert cache.layers[3].rows < 20


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_tokens": 19}, ValueError,
         r"max_tokens must be at least 20: sink_size \(4\) \+ two partitions of lag_size \(8\) tokens, got 19"),
        ({"max_tokens": 20.0}, TypeError, "max_tokens must be an integer, got 20.0"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be at least 20"),
        ({"max_tokens": 64, "keep_ratio": 1.0}, ValueError,
         r"max_tokens \(64\) needs a keep below lag_size \(8\), got 8"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_kept_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LagKVCache(tiny_config("llama"), **SMALL, **arguments)
