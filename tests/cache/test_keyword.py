"""The keyword of the cache: the name that the installed transformers has, and warnings of our own calls as errors."""

from __future__ import annotations

import contextlib
import warnings

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache
from lagkv_ext.cache.keyword import CACHE, cache_argument
from tests.cache.models import SMALL, prompt, tiny_model


def test_models_and_generate_take_the_cache_without_a_warning():
    model = tiny_model("llama")
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32
        )
    ).eval()  # fmt: skip
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        cache = LagKVCache(model.config, keep=2, **SMALL)
        model(prompt(30), **cache_argument(cache, model))
        assert cache.get_seq_length() == 30
        model.generate(prompt(40), **cache_argument(cache), max_new_tokens=3, do_sample=False)
        assert cache.get_seq_length() == 42
        cache = LagKVEncoderDecoderCache(bart.config, keep=2, **SMALL)
        bart.generate(prompt(5), **cache_argument(cache), max_new_tokens=9, min_new_tokens=9, do_sample=False)
        assert cache.get_seq_length() >= 8


class OldName(torch.nn.Module):
    """As a model with code of its own, written for an earlier transformers."""

    def forward(self, input_ids, past_key_values=None, **others):
        assert not others
        return past_key_values


class NewName(torch.nn.Module):
    def forward(self, input_ids, cache=None, **others):
        assert not others
        return cache


@pytest.mark.parametrize("model", [OldName(), NewName()], ids=lambda x: type(x).__name__)
def test_a_model_with_code_of_its_own_gets_the_name_that_its_forward_has(model):
    assert model(prompt(3), **cache_argument("the cache", model)) == "the cache"


def test_what_names_neither_gets_the_name_of_the_installed_transformers():
    assert (
        cache_argument(1, torch.nn.Linear(1, 1))
        == cache_argument(1, object())
        == cache_argument(1)
        == {CACHE: 1}
    )


def test_a_deprecated_call_of_ours_is_an_error_in_tests():
    """pyproject.toml says so. A model is called through torch's `Module`, which is where the warning comes from."""
    model = tiny_model("llama")
    refused = pytest.raises(FutureWarning, match="`past_key_values` is deprecated")
    for call in (model, model.generate):
        with refused if CACHE == "cache" else contextlib.nullcontext(), torch.no_grad():
            call(prompt(3), past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning])
def test_a_warning_is_an_error_where_we_are_the_caller(kind):
    for module in ("tests.x", "lagkv_ext.cache.x", "benchmarks.x"):
        with pytest.raises(kind):
            warnings.warn_explicit("will go", kind, "x.py", 1, module)
    with pytest.warns(kind):
        warnings.warn_explicit("will go", kind, "x.py", 1, "somebody_else.x")
