"""LagKVCache in whole models: what they compute, with the attention of record, and what generate does with it."""

from __future__ import annotations

import copy
import itertools

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument
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

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
EAGER = {"rtol": 1e-3, "atol": 1e-3}  # transformers' eager attention takes its softmax in float32


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def length_after(chunks, lag_size, keep, sink_size):
    """Rows and compressions after these chunks, by the formula of docs/method.md."""
    rows, start, compressions = 0, sink_size, 0
    for new in chunks:
        rows += new
        partitions = (rows - start) // lag_size
        if partitions >= 2:
            rows -= (partitions - 1) * (lag_size - keep)
            start += (partitions - 1) * keep
            compressions += 1
    return rows, compressions


# -- what the model computes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_sees_exactly_the_kept_rows(kind, attention):
    """Prompt, chunks shorter and longer than a partition, single tokens: all logits, the kept set of all heads."""
    model = tiny_model(kind, attention, torch.float64)
    ids = prompt(110, batch=2)
    chunks = [30, 3, 41, 5, *[1] * 20, 7, 4]
    cache = LagKVCache(model.config, keep=3, **SMALL)
    layers = {i: OracleLayer(keep=3, **SMALL) for i in full_layers(kind)}
    tolerance = EXACT if attention == "sdpa" else EAGER
    torch.testing.assert_close(
        forward(model, cache, ids, chunks), Oracle(kind, layers).forward(ids, chunks), **tolerance
    )
    for i, layer in layers.items():
        assert torch.equal(cache.kept_positions(i).long(), layer.positions)
        assert layer.compressions == cache.report().layers[i].compressions >= 7


@given(
    kind=st.sampled_from(KINDS),
    score=st.sampled_from(["std", "cosine"]),
    value_weight=st.sampled_from([0.0, 1.0, 0.7]),
    sink_size=st.integers(0, 9),
    lag_size=st.integers(1, 9),
    keeps=st.tuples(*[st.integers(1, 9)] * 4),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_any_chunks_any_ratio_per_layer(kind, score, value_weight, sink_size, lag_size, keeps, chunks):
    model = tiny_model(kind, "sdpa", torch.float64)
    keeps = {i: min(keeps[i], lag_size) for i in full_layers(kind)}
    cache = LagKVCache(
        model.config,
        lag_size=lag_size,
        sink_size=sink_size,
        layer_keep_ratio={
            i: (keep + 0.5) / lag_size if keep < lag_size else 1.0 for i, keep in keeps.items()
        },
        score=score,
        value_weight=value_weight,
    )
    layers = {
        i: OracleLayer(lag_size, keep, sink_size, score=score, value_weight=value_weight)
        for i, keep in keeps.items()
    }
    ids = prompt(sum(chunks), seed=sum(chunks))
    expected = Oracle(kind, layers).forward(ids, chunks)
    assume(min(layer.gap for layer in layers.values()) > 1e-7)  # nearer scores are ordered by rounding
    torch.testing.assert_close(forward(model, cache, ids, chunks), expected, **EXACT)
    for i, layer in layers.items():
        assert torch.equal(cache.kept_positions(i).long(), layer.positions)
        expected = length_after(chunks, lag_size, keeps[i], sink_size)[0]
        assert cache.report().layers[i].tokens_kept == expected
        assert cache.get_seq_length(i) == sum(chunks)


@pytest.mark.parametrize("settings", [{}, {"skip_layers": [1]}, {"layer_keep_ratio": {-1: 0.5}}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_after_a_compression_stay_causal(kind, attention, settings):
    """6 tokens at once give the logits of 6 times one token (1 token was left after the last full partition)."""
    model = tiny_model(kind, attention, torch.float64)
    ids = prompt(45 + 6, batch=2)
    logits = []
    for rest in ([6], [1] * 6, [2, 4]):
        cache = LagKVCache(model.config, keep_ratio=0.4, **settings, **SMALL)
        logits.append(forward(model, cache, ids, [45, *rest]))
        assert cache.report().layers[full_layers(kind)[-1]].compressions == 1
    tolerance = EXACT if attention == "sdpa" else EAGER
    torch.testing.assert_close(logits[0], logits[1], **tolerance)
    torch.testing.assert_close(logits[0], logits[2], **tolerance)


def test_positions_count_the_tokens_seen():
    model = tiny_model("llama")
    positions = []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"].flatten().tolist()),
        with_kwargs=True,
    )
    try:
        generate(model, prompt(50), LagKVCache(model.config, keep=2, **SMALL), new=20, prefill_chunk_size=13)
    finally:
        handle.remove()
    assert [len(p) for p in positions] == [13, 13, 13, 11, *[1] * 19]
    assert list(itertools.chain(*positions)) == list(range(69))


# -- generate


@pytest.mark.parametrize(("batch", "chunk"), [(1, None), (3, None), (3, 7), (1, 16)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_ratio_1_generates_what_the_uncompressed_cache_generates(kind, attention, batch, chunk):
    model, ids = tiny_model(kind, attention), prompt(50, batch)
    expected = generate(model, ids, DynamicCache(config=model.config))
    cache = LagKVCache(model.config, keep_ratio=1, **SMALL)
    assert torch.equal(generate(model, ids, cache, prefill_chunk_size=chunk), expected)
    assert cache.report().tokens_kept == cache.get_seq_length() == 79
    assert len(set(expected[0, 50:].tolist())) > 5  # not one token for ever


@pytest.mark.parametrize("chunk", [None, 6, 19])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_greedy_decoding_of_the_oracle(kind, chunk):
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(61, batch=2)
    cache = LagKVCache(model.config, keep_ratio=0.25, **SMALL)
    tokens = generate(model, ids, cache, new=25, prefill_chunk_size=chunk)
    prefill = [61] if chunk is None else [len(x) for x in torch.arange(61).split(chunk)]
    layers = {i: OracleLayer(keep=2, **SMALL) for i in full_layers(kind)}
    logits = Oracle(kind, layers).forward(tokens[:, :-1], [*prefill, *[1] * 24])
    assert torch.equal(logits[:, 60:].argmax(dim=-1), tokens[:, 61:])
    rows, compressions = length_after([*prefill, *[1] * 24], 8, 2, 4)
    for i in full_layers(kind):
        layer = cache.report().layers[i]
        assert (layer.tokens_seen, layer.tokens_kept, layer.compressions) == (85, rows, compressions)


def test_compression_changes_what_is_generated():
    """If it did not, none of the tests above would notice a cache that never compresses."""
    model, ids = tiny_model("llama"), prompt(100)
    full = generate(model, ids, DynamicCache(config=model.config))
    assert not torch.equal(generate(model, ids, LagKVCache(model.config, keep=1, **SMALL)), full)


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_with_keep_ratio_1(kind):
    model, ids = tiny_model(kind), prompt(40, batch=2)
    options = {"num_beams": 4, "num_return_sequences": 2}
    expected = generate(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(
        generate(model, ids, LagKVCache(model.config, keep_ratio=1, **SMALL), **options), expected
    )


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_scores_are_those_of_the_compressed_model(kind):
    """Every beam carries the cache of its own history: the score of each result is that of decoding it alone."""
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(40, batch=2)
    result = generate(
        model,
        ids,
        LagKVCache(model.config, keep=2, **SMALL),
        new=20,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = result.sequences
    cache = LagKVCache(model.config, keep=2, **SMALL)
    logits = forward(model, cache, tokens[:, :-1], [40, *[1] * 19])[:, 39:].log_softmax(dim=-1)
    alone = logits.gather(2, tokens[:, 40:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(result.sequences_scores.double(), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding_keeps_what_the_accepted_tokens_keep(kind):
    """Prompt lookup proposes tokens, most are rejected: the kept set and the result are as if they had never been."""
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(12).repeat(1, 5)
    cache, lengths, crops = LagKVCache(model.config, keep=2, **SMALL), [], []
    crop = cache.crop

    def watched_crop(tokens_to_remove):
        crop(tokens_to_remove)
        crops.append(tokens_to_remove)
        lengths.append(cache.get_seq_length())

    cache.crop = watched_crop
    tokens = generate(model, ids, cache, new=40, prompt_lookup_num_tokens=5)
    steps = [b - a for a, b in itertools.pairwise([0, *lengths])]
    assert min(crops) < 0  # some proposals were rejected
    layers = {
        i: OracleLayer(keep=2, **SMALL) for i in full_layers(kind)
    }  # recording, every step is used first
    logits = Oracle(kind, layers).forward(tokens[:, : lengths[-1]], steps)
    assert torch.equal(logits[:, 59 : lengths[-1]].argmax(dim=-1), tokens[:, 60 : lengths[-1] + 1])
    for i, layer in layers.items():
        assert torch.equal(cache.kept_positions(i).long(), layer.positions)
        assert cache.report().layers[i].compressions == layer.compressions > 3


def test_a_second_turn_goes_on_with_the_same_cache():
    model = tiny_model("gemma3", "sdpa", torch.float64)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    first = generate(model, prompt(50), cache, new=10)
    turn = torch.cat([first, prompt(21, seed=1)], dim=1)
    second = generate(model, turn, cache, new=10)
    layers = {i: OracleLayer(keep=2, **SMALL) for i in full_layers("gemma3")}
    # The last token of the first turn was never given to the model: it comes with the second.
    logits = Oracle("gemma3", layers).forward(second[:, :-1], [50, *[1] * 9, 22, *[1] * 9])
    assert torch.equal(logits[:, 80:].argmax(dim=-1), second[:, 81:])


def test_a_copied_prefix_serves_several_continuations():
    model = tiny_model("qwen3", "sdpa", torch.float64)
    prefix = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, prefix, prompt(60), [60])
    before = prefix.kept_hash()
    for seed in (1, 2):
        question = prompt(30, seed=seed)
        fork = copy.deepcopy(prefix)
        alone = LagKVCache(model.config, keep=2, **SMALL)
        forward(model, alone, prompt(60), [60])
        torch.testing.assert_close(
            forward(model, fork, question, [9, 21]), forward(model, alone, question, [9, 21]), rtol=0, atol=0
        )
        assert fork.kept_hash() == alone.kept_hash() != before
        held = {x.untyped_storage().data_ptr() for layer in prefix.layers for x in layer.storages()}
        assert not held & {x.untyped_storage().data_ptr() for layer in fork.layers for x in layer.storages()}
    assert prefix.kept_hash() == before


def test_one_prompt_for_several_samples():
    model, ids = tiny_model("llama", "sdpa", torch.float64), prompt(60)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, cache, ids, [60])
    cache.batch_repeat_interleave(3)
    rest = prompt(25, batch=3, seed=5)
    logits = forward(model, cache, rest, [5, 20])
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.kept_positions(0).shape[0] == 2
    for b in range(3):
        alone = LagKVCache(model.config, keep=2, **SMALL)
        expected = forward(model, alone, torch.cat([ids, rest[b : b + 1]], dim=1), [60, 5, 20])[:, 60:]
        torch.testing.assert_close(logits[b : b + 1], expected, **EXACT)


def test_cropped_tokens_leave_no_trace():
    model = tiny_model("llama", "sdpa", torch.float64)
    cache, ids = LagKVCache(model.config, keep=2, **SMALL), prompt(45)
    forward(model, cache, ids, [45])
    expected = forward(model, copy.deepcopy(cache), prompt(6, seed=1), [6])
    forward(model, cache, prompt(5, seed=9), [5])
    cache.crop(-5)
    assert cache.get_seq_length() == 45
    torch.testing.assert_close(forward(model, cache, prompt(6, seed=1), [6]), expected, **EXACT)


def test_cropping_past_a_compression_changes_no_layer():
    model = tiny_model("qwen3")
    cache = LagKVCache(model.config, keep=2, skip_layers=[0], **SMALL)
    forward(model, cache, prompt(45), [45])
    before = cache.report(), cache.kept_hash()
    with pytest.raises(
        ValueError, match="crop would undo a compression: asked to remove 10 tokens, but only the last 9"
    ):
        cache.crop(-10)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(40)
    assert (cache.report(), cache.kept_hash()) == before
    cache.crop(-9)
    assert [layer.tokens_seen for layer in cache.report().layers] == [36] * 3


def test_reset_starts_again_and_frees_the_memory():
    model = tiny_model("gemma3", "sdpa", torch.float64)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    first = forward(model, cache, prompt(60), [40, 20])
    cache.reset()
    report = cache.report()
    assert (report.tokens_seen, report.compressions) == (0, 0)
    assert all(layer.bytes_held == 0 for layer in report.layers)
    torch.testing.assert_close(forward(model, cache, prompt(60), [40, 20]), first, rtol=0, atol=0)


@pytest.mark.parametrize("modes", [("no_grad", "inference_mode"), ("inference_mode", "no_grad")])
def test_no_grad_and_inference_mode_mix(modes):
    """Tensors made under inference_mode must not be written outside of it: the cache never holds such tensors."""
    model, ids = tiny_model("gemma3", "sdpa", torch.float64), prompt(90)
    expected = forward(model, LagKVCache(model.config, keep=2, **SMALL), ids, [40, *[1] * 20, 30])
    cache, logits = LagKVCache(model.config, keep=2, **SMALL), []
    for part, mode in zip(ids.split([40, *[1] * 20, 30], dim=1), [*modes] * 11, strict=True):
        with getattr(torch, mode)():
            logits.append(model(input_ids=part, **cache_argument(cache)).logits.clone())
        cache.kept_hash()
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=0)
    assert copy.deepcopy(cache).kept_hash() == cache.kept_hash()


def test_gradients_are_refused():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match=r"no gradient history.*torch\.no_grad"):
        model(input_ids=prompt(5), **cache_argument(LagKVCache(model.config)))


# -- masks


@torch.no_grad()
def forward_with_mask(model, cache, ids, mask):
    return model(input_ids=ids, **cache_argument(cache), attention_mask=mask).logits


@pytest.mark.parametrize("settings", [{}, {"skip_layers": [1]}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_ones_is_no_mask(kind, attention, settings):
    """Its length is that of the tokens seen, not of the rows held."""
    model, ids = tiny_model(kind, attention, torch.float64), prompt(64, batch=2)
    cache = LagKVCache(model.config, keep=2, **settings, **SMALL)
    chunks = [40, 1, 7, 1, 15]
    expected = forward(model, copy.deepcopy(cache), ids, chunks)
    logits, seen = [], 0
    for part in ids.split(chunks, dim=1):
        seen += part.shape[1]
        logits.append(forward_with_mask(model, cache, part, torch.ones(2, seen, dtype=torch.long)))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **EXACT)


def test_padding_is_fine_where_nothing_is_compressed():
    model, ids = tiny_model("llama"), prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    cache = LagKVCache(model.config, keep_ratio=1.0, **SMALL)
    assert torch.equal(generate(model, ids, cache, attention_mask=mask), expected)


# -- structure


def test_only_full_attention_layers_are_compressed():
    model = tiny_model("gemma3")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, prompt(80), cache, new=20)
    assert cache.compressed_layers == (1, 3)
    assert [type(layer) for layer in cache.layers[::2]] == [DynamicSlidingWindowLayer] * 2
    reports = cache.report().layers
    assert [x.kind for x in reports] == ["DynamicSlidingWindowLayer", "lagkv"] * 2
    assert [x.tokens_seen for x in reports] == [99] * 4
    assert reports[0].tokens_kept == 11
    assert reports[0].bytes_saved == 0
    uncompressed = DynamicCache(config=model.config)
    generate(model, prompt(80), uncompressed, new=20)
    assert reports[0].bytes_held == uncompressed.layers[0].keys.untyped_storage().nbytes() * 2


def test_what_transformers_expects_of_a_cache():
    config = tiny_config("llama")
    cache = LagKVCache(config, **SMALL)
    assert (len(cache), cache.is_compileable, cache.is_croppable, cache.is_sliding) == (
        3,
        False,
        True,
        [False] * 3,
    )
    assert (cache.get_max_length(), cache.get_seq_length(), cache.is_initialized) == (-1, 0, False)
    assert [(keys, values) for keys, values, _ in cache] == [(None, None)] * 3
    assert "LagKVCache" in repr(cache)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert (cache.is_initialized, cache.get_seq_length()) == (True, 0)
    forward(tiny_model("llama"), cache, prompt(40, batch=2), [40])
    for keys, values, window in cache:
        assert keys.shape == values.shape == (2, 2, cache.report().layers[0].tokens_kept, 16)
        assert window is None
