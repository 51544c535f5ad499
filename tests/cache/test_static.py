"""LagKVStaticCache: the life of a layer and of whole models against the growing cache of the same budget; refusals."""

from __future__ import annotations

import copy
import itertools

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache.compression.plan import plan
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.cache.settings import layer_settings, with_capacity
from lagkv_ext.cache.static.layer import LagKVStaticLayer
from lagkv_ext.cache.static.window import StaticWindowLayer
from tests.cache.families import DECODERS, decoder
from tests.cache.models import SMALL, forward, generate, prompt, tiny_config, tiny_model

BUDGET = 22  # rows: with SMALL and keep=2 every second or third compression starts again from the sink
# The growing cache attends to its rows alone, this one to all slots with most of them hidden.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def states(new, batch=2, heads=2, dims=(8, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, new, dim, generator=generator) for dim in dims)


@st.composite
def static_layers(draw):
    """Any layer, from the least capacity on."""
    lag_size, sink_size = draw(st.integers(2, 9)), draw(st.integers(0, 6))
    keep = draw(st.integers(1, lag_size - 1))
    budget = draw(st.sampled_from(["partition", "head"]))
    settings = layer_settings(
        lag_size=lag_size,
        keep=keep,
        keep_ratio=None,
        sink_size=sink_size,
        value_weight=draw(st.sampled_from([0.0, 1.0, 2.5])),
        score=draw(st.sampled_from(["std", "cosine", "blend"])),
        smooth=draw(st.sampled_from([1, 3])),
        budget=budget,
    )
    step_tokens = draw(st.one_of(st.just(1), st.integers(1, lag_size - keep)))
    capacity = sink_size + 2 * lag_size + step_tokens - 1 + draw(st.integers(0, 30))
    capacity += keep if budget == "head" else 0
    return LagKVStaticLayer(with_capacity(settings, capacity, step_tokens), capacity, step_tokens)


def visible(layer, new):
    """bool [new, columns]: what the mask that transformers makes for this step shows each new token."""
    queries = torch.arange(new) + layer.get_query_offset()
    columns, offset = layer.get_mask_sizes(new)
    return torch.arange(columns) + offset <= queries[:, None]


def addresses(layers):
    return [x.data_ptr() for layer in layers for x in layer.storages()]


def update_both(layer, growing, key, value):
    """One step of both; attention must see the same, token by token. Returns the rows seen by the last token."""
    new = key.shape[2]
    mask = visible(layer, new)
    seen = layer.update(key, value)
    expected = growing.update(key.clone(), value.clone())
    assert mask.shape[1] == seen[0].shape[2]
    for i in range(new):
        rows = expected[0].shape[2] - new + i + 1
        assert int(mask[i].sum()) == rows
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.equal(ours[:, :, mask[-1]], theirs)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 50)),
        st.tuples(st.just("decode"), st.integers(2, 40)),
        st.tuples(st.just("reorder"), st.integers(0, 1 << 16)),
        st.tuples(st.just("read"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


@given(layer=static_layers(), actions=ACTIONS)
def test_any_life_of_a_layer(layer, actions):
    """Rows, positions, lengths and what attention sees: those of a layer that grows, bit for bit, at one address."""
    growing = LagKVLayer(layer.settings)
    layer.lazy_initialization(*states(0))
    before = addresses([layer])
    for number, (action, argument) in enumerate(actions):
        if action in ("append", "decode"):
            for i, new in enumerate([argument] if action == "append" else [1] * argument):
                update_both(layer, growing, *states(new, seed=1000 * number + i))
        elif action == "reorder":
            index = torch.randint(0, 2, (2,), generator=torch.Generator().manual_seed(argument))
            layer.reorder_cache(index)
            growing.reorder_cache(index)
        elif action == "reset":
            layer.reset()
            growing.reset()
        elif growing.rows:
            assert torch.equal(layer.kept_positions(), growing.kept_positions())
        assert (layer.rows, int(layer.get_seq_length())) == (growing.rows, growing.seen)
        assert (layer.compressions, layer.uncompressed_bytes()) == (
            growing.compressions,
            growing.uncompressed_bytes(),
        )
        assert addresses([layer]) == before
        assert layer.rows < layer.settings.max_tokens
    if growing.rows:
        assert torch.equal(layer.kept_positions(), growing.kept_positions())
        assert torch.equal(layer.keys[:, :, : layer.rows], growing.keys)
        assert torch.equal(layer.values[:, :, : layer.rows], growing.values)


@given(layer=static_layers(), data=st.data())
def test_lengths_on_the_device_follow_the_budgets_plan(layer, data):
    rows, start, restarts = 0, layer.settings.sink_size, 0
    for new in data.draw(st.lists(st.integers(1, layer.step_tokens), min_size=1, max_size=150)):
        layer.update(*states(new, 1, 1, (1, 1)))
        layer.settle()
        planned = plan(layer.settings, rows + new, start)
        assert len(planned.passes) <= 1
        again = bool(planned.passes) and planned.start == layer.settings.sink_size
        restarts += again and layer.settings.budget == "partition"
        rows, start = planned.rows, planned.start
        assert (int(layer.length[0]), int(layer.start[0]), int(layer.restarts)) == (rows, start, restarts)


@given(
    window=st.integers(1, 12),
    step_tokens=st.integers(1, 6),
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=30),
)
def test_any_life_of_a_window(window, step_tokens, chunks):
    """Each new token sees itself and the ``window - 1`` tokens before it, at their positions."""
    layer, seen = StaticWindowLayer(window, step_tokens), 0
    layer.lazy_initialization(*states(0))
    before = addresses([layer])
    key, value = states(sum(chunks))
    for new in chunks:
        queries = torch.arange(new)[:, None] + layer.get_query_offset()
        columns, offset = layer.get_mask_sizes(new)
        at = torch.arange(columns) + offset
        mask = (at <= queries) & (at > queries - window)
        rows = layer.update(key[:, :, seen : seen + new], value[:, :, seen : seen + new])
        for i in range(new):
            end = seen + i + 1
            for ours, all_of_it in zip(rows, (key, value), strict=True):
                assert torch.equal(ours[:, :, mask[i]], all_of_it[:, :, max(end - window, 0) : end])
        seen += new
    assert (layer.get_seq_length(), addresses([layer])) == (seen, before)


def test_a_step_allocates_no_rows():
    settings = layer_settings(lag_size=8, keep=2, keep_ratio=None, sink_size=4, value_weight=1.0, score="std")
    layer = LagKVStaticLayer(with_capacity(settings, BUDGET, 1), BUDGET, 1)
    layer.lazy_initialization(*states(0))

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            held = {x.untyped_storage().data_ptr() for x in layer.storages()}
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    assert x.untyped_storage().data_ptr() in held | arrived, func
            return result

    for i in range(60):
        key, value = states(1, seed=i)
        arrived = {x.untyped_storage().data_ptr() for x in (key, value)}
        with Rows():
            layer.update(key, value)
    assert layer.restarts.min() > 2


# -- models


def pair(model, **arguments):
    """The growing cache and the static one."""
    settings = {"keep": 2, **SMALL}
    growing = LagKVCache(model.config, max_tokens=BUDGET, **settings)
    capacity = BUDGET + arguments.get("step_tokens", 1) - 1
    return growing, LagKVStaticCache(model.config, capacity=capacity, **settings, **arguments)


def totals(cache):
    """tokens seen, rows and compressions of every full-attention layer."""
    layers = [x for x in cache.report().layers if x.kind == "lagkv"]
    return [(x.tokens_seen, x.tokens_kept, x.bytes_uncompressed, x.compressions) for x in layers]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_models_compute_what_they_compute_with_the_growing_cache(kind, attention):
    """A prompt in one piece or token by token, longer than all slots or not; chunks later on; many starts again."""
    model = tiny_model(kind, attention, torch.float64)
    close = CLOSE if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-4}  # eager softmax is float32
    for chunks in ([1] * 70, [60, *[1] * 20, 9, *[1] * 9, 22]):
        growing, static = pair(model)
        ids = prompt(sum(chunks), batch=2)
        expected = forward(model, growing, ids, chunks)
        torch.testing.assert_close(forward(model, static, ids, chunks), expected, **close)
        assert static.kept_hash() == growing.kept_hash()
        assert totals(static) == totals(growing)
        assert static.get_seq_length() == sum(chunks)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_steps_of_several_tokens(kind):
    model = tiny_model(kind, "sdpa", torch.float64)
    growing, static = pair(model, step_tokens=6)
    chunks, ids = [5, 6, 1, 3, 2, 6, 6, 30, 4, 4, 1, 6, 6, 6], prompt(86, batch=2)
    expected = forward(model, growing, ids, chunks)
    torch.testing.assert_close(forward(model, static, ids, chunks), expected, **CLOSE)
    assert static.kept_hash() == growing.kept_hash()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generation_is_that_of_the_growing_cache(kind, options):
    model, ids = tiny_model(kind), prompt(45, batch=2)
    growing, static = pair(model)
    text = generate(model, ids, growing, new=50, **options)
    assert torch.equal(generate(model, ids, static, new=50, **options), text)
    assert static.kept_hash() == growing.kept_hash()
    if not options:  # and a conversation goes on
        more = torch.cat([text, prompt(20, batch=2, seed=1)], dim=1)
        whole = {"attention_mask": torch.ones_like(more)}  # the model may have said the padding token
        text = generate(model, more, growing, new=20, **whole)
        assert torch.equal(generate(model, more, static, new=20, **whole), text)


def test_a_mask_of_ones_is_no_mask():
    """Its length is that of the tokens seen: less than the slots, or more."""
    for kind, attention in itertools.product(["llama", "gemma3"], ["sdpa", "eager"]):
        model = tiny_model(kind, attention, torch.float64)
        _, static = pair(model)
        ids, chunks, logits, seen = prompt(52, batch=2), [10, *[1] * 22, 20], [], 0
        expected = forward(model, copy.deepcopy(static), ids, chunks)
        for part in ids.split(chunks, dim=1):
            seen += part.shape[1]
            mask = torch.ones(2, seen, dtype=torch.long)
            with torch.no_grad():
                logits.append(model(input_ids=part, **cache_argument(static), attention_mask=mask).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("family", sorted(set(DECODERS) - {"Falcon-H1"}))  # that one is refused
def test_families(family):
    """Windows, attention sinks, shared layers, layers without attention; a prompt, decoding, several tokens."""
    model = decoder(family, torch.float64)
    close = CLOSE if model.config._attn_implementation == "sdpa" else {"rtol": 1e-4, "atol": 1e-4}
    chunks, ids = [33, *[1] * 25, 12], prompt(70, batch=2)
    growing, static = pair(model)
    expected = forward(model, growing, ids, chunks)
    torch.testing.assert_close(forward(model, static, ids, chunks), expected, **close)
    assert static.kept_hash() == growing.kept_hash()
    assert min(x.restarts.min() for x in static.layers if isinstance(x, LagKVStaticLayer)) >= 1


def test_reset_starts_again_at_the_same_addresses():
    model, ids = tiny_model("gemma3", "sdpa", torch.float64), prompt(60)
    _, static = pair(model)
    first = forward(model, static, ids, [30, *[1] * 30])
    before = addresses(static.layers)
    for layer in static.layers:  # what was there before must not come through, whatever it was
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    static.reset()
    assert (static.report().tokens_seen, static.report().compressions) == (0, 0)
    torch.testing.assert_close(forward(model, static, ids, [30, *[1] * 30]), first, rtol=0, atol=0)
    assert addresses(static.layers) == before


def test_forks_do_not_share_memory():
    model = tiny_model("gemma3", "sdpa", torch.float64)
    _, static = pair(model)
    forward(model, static, prompt(40), [40])
    before, fork = static.kept_hash(), copy.deepcopy(static)
    expected = forward(model, copy.deepcopy(static), prompt(30, seed=1), [1] * 30)
    torch.testing.assert_close(forward(model, fork, prompt(30, seed=1), [1] * 30), expected, rtol=0, atol=0)
    assert fork.kept_hash() != before == static.kept_hash()


@pytest.mark.parametrize("modes", [("no_grad", "inference_mode"), ("inference_mode", "no_grad")])
def test_no_grad_and_inference_mode_mix(modes):
    model, ids, chunks = tiny_model("gemma3", "sdpa", torch.float64), prompt(64), [30, *[1] * 32, 2]
    expected = forward(model, pair(model)[1], ids, chunks)
    _, static = pair(model)
    logits = []
    for part, mode in zip(ids.split(chunks, dim=1), [*modes] * 17, strict=True):
        with getattr(torch, mode)():
            logits.append(model(input_ids=part, **cache_argument(static)).logits.clone())
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=0)


# -- memory and reports


def test_memory_given_at_once():
    model = tiny_model("gemma3", "sdpa", torch.bfloat16)
    _, static = pair(model, max_batch_size=3, dtype=torch.bfloat16)
    before = addresses(static.layers)
    rows = 3 * 2 * BUDGET  # batch, heads
    window = 3 * 2 * 12 * (16 + 16) * 2  # 12 tokens in bfloat16
    lengths = 5 * 3 * 4 + 1 + 8  # five by sequence, due, seen
    assert [x.bytes_held for x in static.report().layers] == [
        window,
        rows * (16 + 16) * 2 + rows * 4 + lengths,
    ] * 2
    assert static.report().tokens_kept == static.get_seq_length() == 0
    forward(model, static, prompt(50, batch=3), [20, *[1] * 30])
    assert addresses(static.layers) == before
    report = static.report()
    assert [x.kind for x in report.layers] == ["StaticWindowLayer", "lagkv"] * 2
    assert [x.tokens_seen for x in report.layers] == [50] * 4
    assert static.kept_positions(-1).shape == (3, 2, report.layers[3].tokens_kept)
    assert static.compressed_layers == (1, 3)


def test_memory_takes_the_dtype_of_the_config():
    config = tiny_config("llama")
    config.dtype = torch.bfloat16
    cache = LagKVStaticCache(config, capacity=BUDGET, max_batch_size=1, keep=2, **SMALL)
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_report_does_not_touch_the_rows():
    """Asked in the middle of a forward pass, it must not run a compression under the eyes of attention."""
    model = tiny_model("llama")
    _, static = pair(model)
    forward(model, static, prompt(19), [1] * 19)
    key, value = (torch.randn(1, 2, 1, 16) for _ in range(2))
    returned = static.update(key, value, 0)
    before = [x.clone() for x in returned]
    assert static.report().layers[0].tokens_kept == 20 - 6
    assert all(torch.equal(a, b) for a, b in zip(returned, before, strict=True))
