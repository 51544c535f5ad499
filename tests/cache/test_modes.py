"""LagKVCache in the decoding modes of generate: what works, what transformers refuses, what never sees a cache."""

from __future__ import annotations

import copy
import itertools

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import DynamicCache, GenerationConfig

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.families import decoder
from tests.cache.models import (
    KINDS,
    SMALL,
    Oracle,
    OracleLayer,
    forward,
    full_layers,
    generate,
    prompt,
    tiny_model,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- assisted (speculative) decoding: prompt lookup is in test_cache_models.py


def draft_model(kind):
    """The model with a little noise in its weights: its drafts are often right and often wrong."""
    model = copy.deepcopy(tiny_model(kind, "sdpa", torch.float64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model(kind):
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(50)
    options = {"assistant_model": draft_model(kind), "new": 40}
    expected = generate(model, ids, DynamicCache(config=model.config), new=40)
    full = LagKVCache(model.config, keep_ratio=1, **SMALL)
    assert torch.equal(generate(model, ids, full, **options), expected)

    cache, lengths, crops = LagKVCache(model.config, keep=2, **SMALL), [], []
    crop = cache.crop

    def watched_crop(tokens_to_remove):
        crop(tokens_to_remove)
        crops.append(tokens_to_remove)
        lengths.append(cache.get_seq_length())

    cache.crop = watched_crop
    tokens = generate(model, ids, cache, **options)
    steps = [b - a for a, b in itertools.pairwise([0, *lengths])]
    assert min(crops) < 0  # some drafts were rejected,
    assert max(steps[1:]) > 1  # others were not
    layers = {i: OracleLayer(keep=2, **SMALL) for i in full_layers(kind)}
    logits = Oracle(kind, layers).forward(tokens[:, : lengths[-1]], steps)
    assert torch.equal(logits[:, 49 : lengths[-1]].argmax(dim=-1), tokens[:, 50 : lengths[-1] + 1])
    for i, layer in layers.items():
        assert torch.equal(cache.kept_positions(i).long(), layer.positions)


def test_assisted_decoding_takes_convolution_states_back():
    model, ids = decoder("LFM2"), prompt(12).repeat(1, 5)
    expected = generate(model, ids, DynamicCache(config=model.config))
    cache = LagKVCache(model.config, keep_ratio=1, **SMALL)
    assert torch.equal(generate(model, ids, cache, prompt_lookup_num_tokens=4), expected)
    compressed = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, ids, compressed, prompt_lookup_num_tokens=4)
    assert compressed.report().compressions > 3


@pytest.mark.parametrize("family", ["Falcon-H1", "Qwen3-Next"])
def test_recurrent_states_cannot_be_taken_back(family):
    model = decoder(family)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, prompt(30), cache, prompt_lookup_num_tokens=4)
    assert cache.get_seq_length() == 0


# -- beams and samples: the scores of beams are in test_cache_models.py


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_beams_and_samples(options):
    model, ids, texts = tiny_model("gemma3"), prompt(40, batch=2), []
    compressed = LagKVCache(model.config, keep=2, **SMALL)
    full = LagKVCache(model.config, keep_ratio=1, **SMALL)
    for cache in (DynamicCache(config=model.config), full, compressed):
        torch.manual_seed(0)
        texts.append(model.generate(ids, **cache_argument(cache), max_new_tokens=20, **options))
    assert torch.equal(texts[0], texts[1])
    assert texts[2].shape == texts[0].shape
    assert {compressed.report().layers[i].compressions for i in full_layers("gemma3")} == {3}


def test_a_prefix_that_was_read_once_goes_on_in_beams():
    model, ids = tiny_model("gemma3", "sdpa", torch.float64), prompt(60)
    prefix = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, prefix, ids[:, :-1], [59])
    beams = prefix.copy()
    beams.batch_repeat_interleave(3)
    whole = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, whole, ids[:, :-1].repeat(3, 1), [59])
    texts = [generate(model, ids, cache, num_beams=3, new=20) for cache in (beams, whole)]
    assert torch.equal(texts[0], texts[1])
    assert prefix.get_seq_length() == 59


# -- what is not in transformers 5 any more


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Contrastive Search", {"penalty_alpha": 0.6, "top_k": 4}),
        ("Group Beam Search", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
        ("Dola Generation", {"dola_layers": "high"}),
        ("Constrained Beam Search", {"num_beams": 2, "force_words_ids": [[3]]}),
    ],
)
def test_modes_that_moved_out_of_transformers_are_refused_by_it(name, options):
    """They are code on the Hub, which runs on `batch_repeat_interleave`, `batch_select_indices` and copies."""
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match=f"{name} requires `trust_remote_code=True`"):
        generate(model, prompt(30), cache, **options)
    assert cache.get_seq_length() == 0


# -- continuous batching


def test_continuous_batching_never_sees_a_cache():
    """`generate_batch` has a paged cache of its own and drops ``past_key_values`` without a word. Its results are
    those without compression, and a cache given to it stays empty; `compress_paged_` is for engines like that."""
    from transformers import ContinuousBatchingConfig

    model, ids = tiny_model("llama"), prompt(30, batch=2)
    cache = LagKVCache(model.config, keep=1, **SMALL)
    try:
        out = model.generate_batch(
            ids.tolist(),
            generation_config=GenerationConfig(
                max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
            warmup=False,
            **cache_argument(cache),
        )
    finally:
        model.set_attn_implementation("sdpa")
    expected = generate(model, ids, DynamicCache(config=model.config), new=5)[:, 30:]
    assert [x.generated_tokens for x in out.values()] == expected.tolist()
    assert (cache.get_seq_length(), cache.report().bytes_held) == (0, 0)
