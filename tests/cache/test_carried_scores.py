"""Carried scores go with the rows that they belong to: into a full static layer, through reordering and conversion."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch

from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.settings import layer_settings, with_capacity
from lagkv_ext.cache.static.layer import LagKVStaticLayer
from tests.cache.record import Record, states


def settings(**changes):
    values = {
        "lag_size": 8,
        "keep": 2,
        "keep_ratio": None,
        "sink_size": 3,
        "value_weight": 1.0,
        "score": "blend",
        "smooth": 3,
        "budget": "head",
    }
    return layer_settings(**{**values, **changes})


@pytest.mark.parametrize("prompt", [1, 60])
def test_a_full_static_layer_holds_what_a_growing_one_holds(prompt):
    """Room for 3 + 2 * 8 + 6 rows: full after three compressions, and 20 more come."""
    bounded = with_capacity(settings(), 25, 1)
    static, growing, record = LagKVStaticLayer(bounded, 25, 1), LagKVLayer(bounded), Record(bounded)
    for i, new in enumerate([prompt, *[1] * 200]):
        key, value = states(new, seed=i)
        static.update(key, value)
        growing.update(key.clone(), value.clone())
        record.append(key, value)
        assert static.rows == growing.rows == record.length < 25
        if i % 17 == 0:
            assert torch.equal(static.kept_positions(), record.rows[2])
            assert torch.equal(growing.kept_positions(), record.rows[2])
    assert static.compressions == growing.compressions > 20 * (prompt == 1)
    assert torch.equal(static.keys[:, :, : static.rows], record.rows[0])
    assert int(static.start[0]) == 3 + bounded.most_chosen == record.start


@pytest.mark.parametrize("max_tokens", [None, 31])
def test_reordered_sequences_take_their_scores_along(max_tokens):
    layer, swapped = (LagKVLayer(settings(max_tokens=max_tokens)) for _ in range(2))
    for i in range(12):
        key, value = states(13, seed=i)
        layer.update(key, value)
        order = torch.tensor([1, 0]) if i >= 6 else torch.tensor([0, 1])
        if i == 6:
            swapped.reorder_cache(order)
        swapped.update(key[order], value[order])
    assert torch.equal(swapped.kept_positions()[[1, 0]], layer.kept_positions())
    assert torch.equal(swapped.keys[[1, 0]], layer.keys)


def test_conversion_of_rows_does_not_round_scores():
    layer = LagKVLayer(settings())
    layer.update(*states(60, seed=0))
    before = layer.tracks[0].scores.clone()
    layer.to(None, torch.bfloat16)
    assert layer.keys.dtype == torch.bfloat16
    assert torch.equal(layer.tracks[0].scores, before)
    layer.to(None, torch.float64)
    layer.update(*(x.double() for x in states(30, seed=1)))
    layer.settle()
    assert layer.tracks[0].scores.dtype == torch.float64
