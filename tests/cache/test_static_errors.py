"""Refusals of LagKVStaticCache, with the reason: when it is made, and when it is used."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import BloomConfig, DeepseekV3Config, FalconH1Config, MistralConfig, T5Config

from lagkv_ext import LagKVStaticCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.models import (
    SMALL,
    forward,
    generate,
    prompt,
    several_tokens_compiled,
    tiny_config,
    tiny_model,
)

ROOM = {"capacity": 28, "keep": 2, **SMALL}


def make(model, **arguments):
    return LagKVStaticCache(model.config, **{**ROOM, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 19}, ValueError, r"capacity must be at least 20: sink_size \(4\) \+ two partitions of lag_size "
         r"\(8\) tokens \+ step_tokens \(1\) - 1, got 19"),
        ({"capacity": 22, "step_tokens": 4}, ValueError, r"at least 23: .* step_tokens \(4\) - 1, got 22"),
        ({"capacity": 28.0}, TypeError, "capacity must be an integer, got 28.0"),
        ({"capacity": True}, TypeError, "capacity must be an integer, got True"),
        ({"step_tokens": 0}, ValueError, "step_tokens must be at least 1, got 0"),
        ({"step_tokens": 7}, ValueError, r"step_tokens must be at most 6: lag_size \(8\) - keep \(2\), .* got 7"),
        ({"keep": 8}, ValueError, r"capacity \(28\) needs a keep below lag_size \(8\), got 8"),
        ({"keep": None, "keep_ratio": 1.0}, ValueError, "needs a keep below lag_size"),
        ({"keep": 9}, ValueError, r"keep must be at most lag_size \(8\), got 9"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 1, got 0"),
        ({"dtype": torch.float16}, ValueError, "needs max_batch_size .* got dtype=torch.float16 and device=None"),
        ({"device": "cpu"}, ValueError, "needs max_batch_size .* got dtype=None and device=cpu"),
        ({"layer_keep_ratio": {0: 0.5}}, TypeError, "layer_keep_ratio"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make(tiny_model("llama"), **arguments)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "llama"}, TypeError, "config must be a transformers configuration, got dict"),
        (MistralConfig(sliding_window=16, num_hidden_layers=2), ValueError,
         "MistralConfig has no full-attention layer .* 2 layers are StaticSlidingWindowLayer"),
        (FalconH1Config(num_hidden_layers=2), ValueError,
         "FalconH1Config has layers that would need room for every token: LinearAttentionAndStaticFullAttentionLayer"),
        (T5Config(), ValueError, "is an encoder-decoder model"),
        (DeepseekV3Config(num_hidden_layers=2), ValueError, "latent attention"),
        (BloomConfig(), ValueError, "bias from row numbers"),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_models_it_does_not_serve(config, error, message):
    with pytest.raises(error, match=message):
        LagKVStaticCache(config, **ROOM)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_mask_over_all_slots(attention):
    message = f"needs the attention implementation eager or sdpa, got {attention}: rows behind"
    config = tiny_config("llama", attention)
    with pytest.raises(ValueError, match=message):
        LagKVStaticCache(config, **ROOM)
    config._attn_implementation = "sdpa"
    cache = LagKVStaticCache(config, **ROOM)
    config._attn_implementation = attention  # as set_attn_implementation does, later
    with pytest.raises(ValueError, match=message):
        cache.get_mask_sizes(1, 0)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return mask


@torch.no_grad()
def step(model, cache, ids, mask):
    return model(input_ids=ids, attention_mask=mask, **cache_argument(cache))


@pytest.mark.parametrize(
    ("new", "change", "message"),
    [
        (1, lambda x: None, r"holds a padded batch, so the model needs an attention_mask \[2, 31\] .* got none"),
        (1, lambda x: torch.ones_like(x), "attention_mask changes what was seen: column 0 of sequence 1"),
        (1, lambda x: x[:, 1:], r"attention_mask must be \[2, more than 30\]"),
        (2, lambda x: x, "one token of every sequence at a time after a padded prompt, got an attention_mask for 2"),
    ],
    ids=["none", "changed", "short", "two"],
)  # fmt: skip
def test_masks_after_a_padded_prompt(new, change, message):
    model, ids = tiny_model("llama"), prompt(32, batch=2)
    cache, mask = make(model), padded(ids)
    step(model, cache, ids[:, :30], mask[:, :30])
    before = cache.report(), cache.kept_hash()
    with pytest.raises(ValueError, match=message):
        step(model, cache, ids[:, 30 : 30 + new], change(mask[:, : 30 + new]))
    assert (cache.report(), cache.kept_hash()) == before
    step(model, cache, ids[:, 30:31], mask[:, :31].bool())


def test_padding_of_one_new_token():
    model, ids = tiny_model("llama"), prompt(31, batch=2)
    cache, mask = make(model), padded(ids)
    step(model, cache, ids[:, :30], mask[:, :30])
    mask[0, 30] = 0
    with pytest.raises(ValueError, match=r"an attention_mask for 1 with 1 zeros\. Use LagKVCache"):
        step(model, cache, ids[:, 30:], mask)


def test_padding_that_comes_later():
    model, ids = tiny_model("gemma3"), prompt(40, batch=2)
    cache, mask = make(model), torch.ones(2, 40, dtype=torch.long)
    step(model, cache, ids[:, :30], mask[:, :30])
    mask[0, 30:33] = 0
    with pytest.raises(ValueError, match=r"padding with the first prompt alone, got .* after 30 tokens"):
        step(model, cache, ids[:, 30:], mask)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize(
    ("kind", "zeros", "message"),
    [
        ("llama", (slice(1, 2), slice(4, 6)), "padding among the tokens of sequence 1"),
        ("llama", (slice(1, 2), slice(0, 30)), "nothing but padding for sequence 1"),
        ("llama", (slice(1, 2), slice(26, 30)), r"behind a token \(column 26 of sequence 1\), .* does not take"),
        ("gemma3", (slice(1, 2), slice(26, 30)), "StaticCache does not take: pad on the left"),
    ],
)  # fmt: skip
def test_padding_that_cannot_be(kind, zeros, message):
    model, ids = tiny_model(kind), prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[zeros] = 0
    cache = make(model)
    with pytest.raises(ValueError, match=message):
        step(model, cache, ids, mask)
    assert cache.get_seq_length() == 0
    step(model, cache, ids, None)  # and it is as it was before
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"key states must agree with the cache in batch size \(2\), got shape \[1, 2, 1, 16\]"),
        (lambda x: x[..., :8], r"agree with the cache in head dim \(16\)"),
        (lambda x: x.double(), r"must have the dtype of the cache \(torch.float32\), got torch.float64"),
        (lambda x: x[0], "4 dimensions"),
        (lambda x: x.int(), "key states must be float16, bfloat16, float32 or float64, got torch.int32"),
    ],
    ids=["batch", "dim", "dtype", "rank", "integers"],
)  # fmt: skip
def test_states_unlike_those_held(change, message):
    cache = make(tiny_model("gemma3"), max_batch_size=2)
    cache.set_attention_mask(None)
    before = cache.report()
    for layer in (0, 1):  # a window, full attention
        with pytest.raises(ValueError, match=message):
            cache.update(*[change(torch.randn(2, 2, 1, 16))] * 2, layer)
    assert cache.report() == before


def test_gradients():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match=r"no gradient history.*torch\.no_grad"):
        model(input_ids=prompt(5), **cache_argument(make(model)))


def test_changes_that_fixed_memory_does_not_allow():
    model = tiny_model("gemma3")
    cache = make(model)
    forward(model, cache, prompt(40, batch=2), [40])
    before = cache.report(), cache.kept_hash()
    with pytest.raises(ValueError, match=r"cannot remove tokens, got crop\(-1\)"):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(
        ValueError, match=r"number of sequences, which batch_repeat_interleave would: .* max_batch_size"
    ):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="batch_select_indices"):
        cache.batch_select_indices(torch.tensor([0]))
    assert (cache.report(), cache.kept_hash()) == before
    assert (cache.is_croppable, cache.is_compileable, cache.get_max_length()) == (False, True, -1)


def test_assisted_decoding():
    """transformers asks whether the cache can be cropped."""
    model, ids = tiny_model("llama"), prompt(20)
    with pytest.raises(ValueError, match="crop"):
        generate(model, ids, make(model), prompt_lookup_num_tokens=3)


def test_positions_of_nothing():
    cache = make(tiny_model("gemma3"), max_batch_size=1)
    with pytest.raises(ValueError, match="seen no token yet"):
        cache.kept_positions(1)
    with pytest.raises(ValueError, match=r"one of the full-attention layers \[1, 3\], got 0"):
        cache.kept_positions(0)


# -- compiled regions


def compiled(model, cache):
    torch._dynamo.reset()
    return torch.compile(
        lambda ids: model(input_ids=ids, **cache_argument(cache)).logits, fullgraph=True, backend="eager"
    )


@several_tokens_compiled
def test_prompts_in_a_compiled_region():
    model = tiny_model("llama")
    with (
        pytest.raises(Exception, match=r"at most step_tokens \(1\) tokens in one step of a compiled"),
        torch.no_grad(),
    ):
        compiled(model, make(model, max_batch_size=1))(prompt(30))


def test_memory_in_a_compiled_region():
    model = tiny_model("llama")
    with pytest.raises(Exception, match=r"no memory yet .* give max_batch_size"), torch.no_grad():
        compiled(model, make(model))(prompt(1))


def test_a_padded_batch_in_a_compiled_region():
    model, ids = tiny_model("llama"), prompt(31, batch=2)
    cache, mask = make(model), padded(ids)
    step(model, cache, ids[:, :30], mask[:, :30])
    with (
        pytest.raises(Exception, match="padded batch, whose mask a compiled region cannot make"),
        torch.no_grad(),
    ):
        compiled(model, cache)(ids[:, 30:])


def test_visible_columns_of_a_layer_that_has_none():
    cache = make(tiny_model("gemma3"), max_batch_size=1)
    with pytest.raises(ValueError, match=r"one of the full-attention layers \[1, 3\], with memory, got 0"):
        cache.visible_columns(0)
    with pytest.raises(ValueError, match="with memory, got 1"):
        make(tiny_model("gemma3")).visible_columns(1)
