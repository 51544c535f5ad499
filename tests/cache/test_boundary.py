"""``boundary``: what a cache holds and what attention sees are functions of the tokens alone, not of the steps."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache, reference
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.cache.padded.padding import Padding
from lagkv_ext.cache.settings import layer_settings
from tests.cache.families import encoder_decoder
from tests.cache.models import KINDS, SMALL, forward, full_layers, generate, prompt, tiny_model
from tests.cache.padded_batches import EXACT

RULE = {"keep": 2, "boundary": 16, **SMALL}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def partitions(seen: int, settings) -> int:
    """The rule, for a token at position ``seen``: how many partitions are compressed in the cache that it sees."""
    return max(
        0, (seen // settings.boundary * settings.boundary - settings.sink_size) // settings.lag_size - 1
    )


def positions_at(states, seen: int, settings):
    """Positions ``[B, H, rows]`` that the rule leaves of the first ``seen`` tokens."""
    end = settings.sink_size + (partitions(seen, settings) + 1) * settings.lag_size
    batch, heads = states[0].shape[:2]
    later = torch.arange(min(end, seen), seen).expand(batch, heads, -1)
    if not partitions(seen, settings):
        return torch.arange(seen).expand(batch, heads, seen)
    head = [x[:, :, :end] for x in states]
    index = reference.compress(
        *head, settings.sink_size, settings.lag_size, settings.keep, score=settings.score
    )[2]
    return torch.cat([index.long(), later], dim=2)


def rows_at(x, positions):
    return x.gather(2, positions[..., None].expand(*positions.shape, x.shape[3]))


def states(tokens, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, tokens, dim, generator=generator) for dim in (8, 6))


@st.composite
def rules(draw):
    lag_size = draw(st.integers(1, 7))
    return layer_settings(
        lag_size=lag_size,
        keep=draw(st.integers(1, lag_size)),
        keep_ratio=None,
        sink_size=draw(st.integers(0, 9)),
        value_weight=1.0,
        # Standardised scores of keys and values of two tokens can cancel: a tie that rounding decides.
        score=draw(st.sampled_from(["std", "cosine"] if lag_size > 2 else ["std"])),
        boundary=lag_size * draw(st.integers(1, 4)),
    )


@given(settings=rules(), steps=st.lists(st.integers(1, 40), min_size=1, max_size=25), seed=st.integers(0, 99))
def test_rows_depend_on_the_tokens_alone(settings, steps, seed):
    """Steps of any size, cut at the boundaries: what is held, and what attention of every step sees."""
    whole = states(sum(steps), seed)
    layer = LagKVLayer(settings)
    seen = 0
    for step in steps:
        while step:
            new = min(step, settings.boundary - seen % settings.boundary)
            held = positions_at(whole, seen, settings)
            assert layer.get_mask_sizes(new) == (held.shape[2] + new, seen - held.shape[2])
            returned = layer.update(*(x[:, :, seen : seen + new].clone() for x in whole))
            for x, full in zip(returned, whole, strict=True):
                old = rows_at(full, held)
                assert torch.equal(x, torch.cat([old, full[:, :, seen : seen + new]], dim=2))
            seen, step = seen + new, step - new
        assert torch.equal(layer.kept_positions().long(), positions_at(whole, seen, settings))
    if settings.compresses:
        held = layer.rows
        assert held == seen - partitions(seen, settings) * (settings.lag_size - settings.keep)


@given(settings=rules(), before=st.integers(0, 60), new=st.integers(1, 60))
def test_a_step_over_a_compression_is_refused_and_others_are_right(settings, before, new):
    whole = states(before + new, seed=before)
    layer, single = LagKVLayer(settings), LagKVLayer(settings)
    for i in range(before):
        layer.update(*(x[:, :, i : i + 1].clone() for x in whole))
    # The tokens of one step see the same cache. The rule may want another one for its last token.
    crosses = settings.compresses and partitions(before, settings) != partitions(before + new - 1, settings)
    if crosses:
        with pytest.raises(ValueError, match=f"a step must end at .* prefill_chunk_size={settings.boundary}"):
            layer.update(*(x[:, :, before:].clone() for x in whole))
        assert layer.seen == before
        return
    layer.update(*(x[:, :, before:].clone() for x in whole))
    for i in range(before + new):
        single.update(*(x[:, :, i : i + 1].clone() for x in whole))
    assert torch.equal(layer.kept_positions(), single.kept_positions())


@given(settings=rules(), seen=st.integers(1, 80), removed=st.integers(0, 80))
def test_crop_leaves_what_the_rule_leaves_or_is_refused(settings, seen, removed):
    whole = states(seen, seed=seen)
    layer = LagKVLayer(settings)
    for i in range(seen):
        layer.update(*(x[:, :, i : i + 1].clone() for x in whole))
    left = max(seen - removed, 0)
    if settings.compresses and partitions(left, settings) != partitions(seen, settings):
        with pytest.raises(ValueError, match="would undo a compression"):
            layer.crop(-removed)
        left = seen
    else:
        layer.crop(-removed)
    if left:
        assert torch.equal(layer.kept_positions().long(), positions_at(whole, left, settings))


@pytest.mark.parametrize("settings", [{}, {"skip_layers": [1]}, {"quantization": "int8"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_the_same_for_every_chunking(kind, settings):
    """Logits of every token, up to rounding, and the kept tokens exactly."""
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(90, batch=2)
    results = []
    for chunks in ([1] * 90, [16] * 5 + [10], [5, 11, 16, 7, 9, 16, 16, 10]):
        cache = LagKVCache(model.config, **RULE, **settings)
        results.append((forward(model, cache, ids, chunks), cache.kept_hash()))
        assert min(cache.layers[i].compressions for i in full_layers(kind) if i != 1 or not settings) >= 3
    for logits, kept in results[1:]:
        torch.testing.assert_close(logits, results[0][0], **EXACT)
        assert kept == results[0][1]


def test_generate_reads_the_prompt_in_chunks():
    model, ids = tiny_model("gemma3", "sdpa", torch.float64), prompt(75)
    whole = LagKVCache(model.config, **RULE)
    text = generate(model, ids, whole, new=40, prefill_chunk_size=16)
    again = LagKVCache(model.config, **RULE)
    forward(model, again, text[:, :-1], [1] * 114)
    assert whole.kept_hash() == again.kept_hash()
    with pytest.raises(
        ValueError, match="a step must end at 64 tokens, where a compression comes due: 75 tokens"
    ):
        generate(model, ids, LagKVCache(model.config, **RULE))
    short = LagKVCache(model.config, **RULE)
    generate(model, ids[:, :30], short, new=3)  # nothing is compressed before 20 tokens more than the sink
    assert [layer.compressions for layer in short.report().layers] == [0, 1, 0, 1]


def test_a_refused_step_leaves_every_layer_alone():
    """The first layers of Gemma 3 have a window and would take the tokens."""
    model, ids = tiny_model("gemma3"), prompt(75)
    cache = LagKVCache(model.config, **RULE)
    with pytest.raises(ValueError, match="boundary=16"), torch.no_grad():
        model(ids, **cache_argument(cache))
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 4


def test_sequences_of_a_padded_batch_have_boundaries_of_their_own():
    settings = layer_settings(
        lag_size=8, keep=2, keep_ratio=None, sink_size=4, value_weight=1.0, score="std", boundary=16
    )
    padding = Padding(2, 0)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :11] = 0
    padding.take(mask, 0)
    layer = LagKVLayer(settings)
    layer.pad(padding)
    alone = [LagKVLayer(settings), LagKVLayer(settings)]
    whole = states(80, seed=0)
    for begin, end in itertools.pairwise([0, *range(16, 81)]):
        step = [x[:, :, begin:end].clone() for x in whole]
        layer.update(*(x.clone() for x in step))
        alone[0].update(*(x[:1] for x in step))
        alone[1].update(*(x[1:, :, 11 if begin == 0 else 0 :] for x in step))
    for b, one in enumerate(alone):
        assert torch.equal(layer.kept_positions()[b][:, -one.rows :], one.kept_positions()[0])
        assert one.compressions >= 3
    with pytest.raises(ValueError, match="a step must end at 80 tokens"):  # of the second sequence, after 69
        layer.update(*states(12, seed=1))


def test_an_encoder_decoder():
    model, ids = encoder_decoder("BART"), prompt(20)
    cache = LagKVEncoderDecoderCache(model.config, **RULE)
    model.generate(ids, **cache_argument(cache), max_new_tokens=60, min_new_tokens=60, do_sample=False)
    assert {layer.tokens_kept for layer in cache.report().layers} == {60 - 4 * 6}


def test_assisted_decoding_is_refused():
    model = tiny_model("llama")
    cache = LagKVCache(model.config, **RULE)
    with pytest.raises(ValueError, match="assisted decoding is not possible with boundary=16"):
        generate(model, prompt(20), cache, prompt_lookup_num_tokens=3)
    assert not cache.is_croppable


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"boundary": 12}, ValueError, r"boundary must be a multiple of lag_size \(8\), got 12"),
        ({"boundary": 0}, ValueError, "boundary must be at least 1, got 0"),
        ({"boundary": 16.0}, TypeError, "boundary must be an integer, got 16.0"),
        ({"boundary": 16, "max_tokens": 64}, ValueError, "give boundary or max_tokens, not both"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LagKVCache(tiny_model("llama").config, **SMALL, **arguments)
