"""Masks of padded batches that do not fit are refused, before anything is written."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.models import SMALL, generate, prompt, tiny_model
from tests.cache.padded_batches import (
    padded,
    run,
    run_more,
    texts,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MASKS = {  # columns 0 to 9 are the prompt, as it was seen by the cache; 10 to 12 are new
    "seen changed": (
        [[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 13],
        "changes what was seen: column 1 of sequence 0 was padding when the model was given it, and now is a token",
    ),
    "token hidden": (
        [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, *[1] * 9]],
        "changes what was seen: column 3 of sequence 1 was a token when the model was given it, and now is padding",
    ),
    "hole": (
        [[0, 0, *[1] * 11], [*[1] * 11, 0, 1]],
        r"padding among the tokens of sequence 1: its tokens begin in columns \[10, 12\].*ones_like",
    ),
    "too few columns": ([[0, 0, *[1] * 10], [1] * 12], r"tokens seen and the 3 new ones, got shape \[2, 12\]"),
    "too many columns": ([[0, 0, *[1] * 12], [1] * 14], r"tokens seen and the 3 new ones, got shape \[2, 14\]"),
    "other batch": ([[0, 0, *[1] * 11]] * 3, r"attention_mask must be \[2, more than 10\] .* got \[3, 13\]"),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_does_not_fit_is_refused_before_anything_is_written(name, attention):
    rows, message = MASKS[name]
    model = tiny_model("llama", attention)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    ids, mask = prompt(13, batch=2), torch.ones(2, 13, dtype=torch.long)
    mask[0, :2] = 0
    run(model, cache, ids[:, :10], mask[:, :10], [10])
    before = cache.report(), cache.kept_hash(), [x.keys.clone() for x in cache.layers]
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(input_ids=ids[:, 10:], attention_mask=torch.tensor(rows), **cache_argument(cache))
    with (
        pytest.raises(ValueError, match=r"attention_mask \[2, 13\] with every step, got none"),
        torch.no_grad(),
    ):
        model(input_ids=ids[:, 10:], **cache_argument(cache))
    assert (cache.report(), cache.kept_hash()) == before[:2]
    assert all(torch.equal(x.keys, y) for x, y in zip(cache.layers, before[2], strict=True))
    alone = LagKVCache(model.config, keep=2, **SMALL)
    expected = run(model, alone, ids[:1, 2:], torch.ones(1, 11), [8, 3])
    logits = run_more(model, cache, ids[:, 10:], mask.bool())  # the cache goes on as if nothing had been
    torch.testing.assert_close(logits[0], expected[0, 8:], rtol=1e-3, atol=1e-3)


def test_a_first_mask_that_does_not_fit_leaves_the_cache_as_it_was():
    model, ids = tiny_model("llama"), prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 5] = 0
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match="padding among the tokens of sequence 1"):
        generate(model, ids, cache, attention_mask=mask)
    assert cache.get_seq_length() == 0
    generate(model, ids, cache)
    fresh = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, ids, fresh)
    assert cache.kept_hash() == fresh.kept_hash()


def test_a_prompt_with_padding_tokens_is_refused_with_the_way_out():
    """generate infers a mask from padding tokens by itself."""
    model, ids = tiny_model("llama"), prompt(30)
    ids[0, 3] = model.config.pad_token_id
    with pytest.raises(ValueError, match="ones_like"):
        generate(model, ids, LagKVCache(model.config, **SMALL))
    generate(model, ids, LagKVCache(model.config, **SMALL), attention_mask=torch.ones_like(ids))


def test_a_sequence_of_nothing_but_padding_is_refused():
    """At the first token that the model made up for it; a prompt whose first chunks are padding is fine."""
    model, (ids, mask) = tiny_model("llama"), padded(texts([20, 12]))
    mask[1] = 0
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match=r"sequence 1 had nothing but padding .* all 20 columns"):
        generate(model, ids, cache, attention_mask=mask)
    with pytest.raises(ValueError, match="nothing but padding for sequence 1"):
        LagKVCache.check_attention_mask(mask)


def test_a_told_chunk_of_nothing_but_padding_is_one_that_was_seen():
    """The caller tells masks chunk by chunk: what the model's own masks may say, `set_attention_mask` may."""
    model = tiny_model("llama", dtype=torch.float64)
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :25] = 0
    told, seen = (LagKVCache(model.config, keep=2, **SMALL) for _ in range(2))
    results = []
    for cache, tells in ((told, True), (seen, False)):
        at, logits = 0, []
        for part in ids.split([20, 16, 4], dim=1):
            at += part.shape[1]
            if tells:
                cache.set_attention_mask(mask[:, :at])
            with torch.no_grad():
                logits.append(model(part, attention_mask=mask[:, :at], **cache_argument(cache)).logits)
        results.append(torch.cat(logits, dim=1))
    assert torch.equal(*results)
    assert told.kept_hash() == seen.kept_hash()
    alone = LagKVCache(model.config, keep=2, **SMALL)
    alone.set_attention_mask(torch.zeros(1, 20, dtype=torch.long))
    with torch.no_grad():
        model(ids[:1, :20], attention_mask=mask[:1, :20] * 0, **cache_argument(alone))
    with pytest.raises(ValueError, match="sequence 0 had nothing but padding in its prompt"):
        alone.set_attention_mask(torch.tensor([[0] * 20 + [1]]))


def test_padding_behind_tokens_is_refused_beside_sliding_windows():
    """Their layers count columns: with padding in the window, a sequence would see fewer tokens than alone."""
    model, (ids, mask) = tiny_model("gemma3"), padded(texts([20, 12]), side="right")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match=r"behind a token \(column 12 of sequence 1\), .*SlidingWindow"):
        run(model, cache, ids, mask, [20])
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, 4), r"must be \[B, tokens\], got shape \[2, 3, 4\]"),
        (torch.tensor([[0, 1, 2]]), "zeros and ones, got 2"),
        (torch.tensor([[1, 0, 1]]), r"among the tokens of sequence 0: its tokens begin in columns \[0, 2\]"),
    ],
)
def test_what_is_no_mask_of_a_prompt(mask, message):
    with pytest.raises(ValueError, match=message):
        LagKVCache.check_attention_mask(mask)
    LagKVCache.check_attention_mask(None)
    LagKVCache.check_attention_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))


def test_generate_after_padding_on_the_right_is_refused():
    """transformers counts positions from the padding on, and takes the first token from padding too."""
    model, (ids, mask) = tiny_model("llama"), padded(texts([20, 12]), side="right")
    with pytest.raises(ValueError, match=r"sequence 1 has padding behind a token, so position_ids .* pad on"):
        generate(model, ids, LagKVCache(model.config, keep=2, **SMALL), attention_mask=mask)
