"""LagKVStaticCache with padded batches: what LagKVCache does with them, and through steps that were compiled."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from transformers import CompileConfig

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.cache.padded.padding import Padding
from lagkv_ext.cache.settings import layer_settings, with_capacity
from lagkv_ext.cache.static.layer import LagKVStaticLayer
from tests.cache.models import SMALL, generate, prompt, tiny_model

BUDGET = 22
LEFT = (0, 23, 7)  # padding columns of three sequences


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(length):
    ids = prompt(length, batch=len(LEFT))
    mask = torch.ones_like(ids)
    for b, columns in enumerate(LEFT):
        mask[b, :columns] = 0
    return ids, mask


def pair(model, **arguments):
    """The growing cache and the static one."""
    settings = {"keep": 2, **SMALL}
    growing = LagKVCache(model.config, max_tokens=BUDGET, **settings)
    return growing, LagKVStaticCache(model.config, capacity=BUDGET, **settings, **arguments)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    decoded=st.integers(1, 60),
    extra=st.integers(0, 20),
    step_tokens=st.integers(1, 3),
)
def test_any_life_of_a_padded_layer(lengths, decoded, extra, step_tokens):
    """Prompts of any lengths, padded on the left: rows, positions and what attention sees of every sequence."""
    settings = layer_settings(lag_size=6, keep=2, keep_ratio=None, sink_size=3, value_weight=1.0, score="std")
    capacity = 15 + step_tokens - 1 + extra
    layer = LagKVStaticLayer(with_capacity(settings, capacity, step_tokens), capacity, step_tokens)
    columns = max(lengths)
    tokens = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    padding = Padding(len(lengths), 0)
    padding.take(tokens.long(), 0)
    growing = LagKVLayer(layer.settings)
    growing.pad(padding)
    layer.set_padding(padding)
    for i in range(decoded + 1):
        new = 1 if i else columns
        generator = torch.Generator().manual_seed(i)
        key, value = (torch.randn(len(lengths), 2, new, dim, generator=generator) for dim in (8, 6))
        theirs_shown = growing.visible(new)
        ours_shown = layer.visible(1) if i else theirs_shown
        ours, theirs = layer.update(key, value), growing.update(key.clone(), value.clone())
        for b in range(len(lengths)):
            for x, y in zip(ours, theirs, strict=True):
                assert torch.equal(x[b][:, ours_shown[b]], y[b][:, theirs_shown[b]])
    assert torch.equal(layer.kept_positions(), growing.kept_positions())
    assert (layer.rows, layer.compressions, int(layer.seen)) == (
        growing.rows,
        growing.compressions,
        growing.seen,
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa")])
def test_generation_is_that_of_the_growing_cache(kind, attention, options):
    model, (ids, mask) = tiny_model(kind, attention, torch.float64), batch(50)
    growing, static = pair(model)
    text = generate(model, ids, growing, new=50, attention_mask=mask, **options)
    assert torch.equal(generate(model, ids, static, new=50, attention_mask=mask, **options), text)
    assert static.kept_hash() == growing.kept_hash()
    for ours, theirs in zip(static.report().layers, growing.report().layers, strict=True):
        if ours.kind == "lagkv":
            assert (ours.tokens_seen, ours.tokens_kept, ours.compressions, ours.bytes_uncompressed) == (
                theirs.tokens_seen,
                theirs.tokens_kept,
                theirs.compressions,
                theirs.bytes_uncompressed,
            )


def test_every_sequence_generates_what_it_would_alone():
    model, (ids, mask) = tiny_model("gemma3", "sdpa", torch.float64), batch(50)
    text = generate(model, ids, pair(model)[1], new=40, attention_mask=mask)
    for b, columns in enumerate(LEFT):
        alone = generate(model, ids[b : b + 1, columns:], pair(model)[1], new=40)
        assert torch.equal(text[b, columns:], alone[0])


def test_a_reset_forgets_the_padding():
    model, (ids, mask) = tiny_model("llama", "sdpa", torch.float64), batch(50)
    _, static = pair(model)
    expected = generate(model, ids, static, new=30)
    before = [x.data_ptr() for layer in static.layers for x in layer.storages()]
    static.reset()
    generate(model, ids, static, new=30, attention_mask=mask)
    static.reset()
    assert torch.equal(generate(model, ids, static, new=30), expected)
    assert [x.data_ptr() for layer in static.layers for x in layer.storages()] == before


def test_generate_compiles_its_steps_once():
    torch._dynamo.reset()
    counters.clear()
    model, (ids, mask) = tiny_model("llama", "sdpa", torch.float64), batch(50)
    growing, static = pair(model)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    compile_config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        text = generate(model, ids, static, new=50, attention_mask=mask, compile_config=compile_config)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(text, generate(model, ids, growing, new=50, attention_mask=mask))
    del model._compiled_call


def test_a_compiled_step_that_makes_its_own_mask():
    """`visible_columns` on the device: for loops other than generate's."""
    torch._dynamo.reset()
    counters.clear()
    model, (ids, mask) = tiny_model("llama", "sdpa", torch.float64), batch(90)
    growing, static = pair(model)

    def step(token, position):
        shown = static.visible_columns(0)[:, None, None]
        return model(token, attention_mask=shown, position_ids=position, **cache_argument(static)).logits

    step = torch.compile(step, fullgraph=True, backend="eager")
    position = mask.cumsum(dim=1) - 1
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for cache in (growing, static):
            model(
                ids[:, :30],
                attention_mask=mask[:, :30],
                position_ids=position[:, :30].clamp(min=0),
                **cache_argument(cache),
            )
        for i in range(30, 90):
            logits = step(ids[:, i : i + 1], position[:, i : i + 1])
            expected = model(
                ids[:, i : i + 1],
                attention_mask=mask[:, : i + 1],
                position_ids=position[:, i : i + 1],
                **cache_argument(growing),
            ).logits
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
    assert static.kept_hash() == growing.kept_hash()
