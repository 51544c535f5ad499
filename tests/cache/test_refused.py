"""Models that the caches refuse, with the reason, and layers of served models that stay uncompressed."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache import models
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.models import SMALL, forward, prompt

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"
    num_hidden_layers = 2


class WrapperConfig(PreTrainedConfig):
    """A family of its own around a text model that is served, as vision models are."""

    model_type = "strange_vision"
    sub_configs = {"text_config": transformers.LlamaConfig}  # noqa: RUF012
    text_config: object = None


@pytest.fixture(autouse=True)
def _nobody_is_admitted(monkeypatch):
    monkeypatch.setattr(models, "_admitted", set())


def test_a_family_that_nobody_judged_is_refused():
    with pytest.raises(ValueError, match=r"has not judged \(strange\).*admit\('strange'\)"):
        LagKVCache(StrangeConfig())
    with pytest.raises(ValueError, match=r"has not judged \(strange_vision\)"):
        LagKVCache(WrapperConfig(text_config=transformers.LlamaConfig(**TINY)))
    with pytest.raises(ValueError, match=r"has not judged \(strange\)"):
        LagKVStaticCache(StrangeConfig(), capacity=64, keep=2, **SMALL)


def test_admitted_families_are_served():
    models.admit("strange")
    assert LagKVCache(StrangeConfig()).compressed_layers == (0, 1)
    models.admit("strange_vision")
    assert LagKVCache(WrapperConfig(text_config=transformers.LlamaConfig(**TINY))).compressed_layers


@pytest.mark.parametrize("family", models.REFUSED)
def test_families_known_to_go_wrong_cannot_be_admitted(family):
    with pytest.raises(ValueError, match="cannot be admitted: it "):
        models.admit(family)


def test_a_reason_in_the_configuration_counts_for_admitted_families_too():
    models.admit("strange")
    for field, value in {
        "kv_lora_rank": 8,
        "alibi": True,
        "rel_extent": 8,
        "add_cross_attention": True,
    }.items():
        config = StrangeConfig()
        setattr(config, field, value)
        with pytest.raises(ValueError, match=r"multi-head latent attention|row numbers|cross-attention"):
            LagKVCache(config)


def test_no_family_is_both_served_and_refused():
    assert not models.SERVED & set(models.REFUSED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.DogeConfig(), "from the values of all heads: LagKV drops other rows in every head"),
        (lambda: transformers.DiffLlamaConfig(), "joins the values of two heads row by row"),
        (lambda: transformers.CpmAntConfig(), "row numbers of the cache \\(relative buckets\\)"),
        (lambda: transformers.MptConfig(), "row numbers of the cache \\(ALiBi\\)"),
        (lambda: transformers.FalconConfig(alibi=True), "row numbers of the cache \\(ALiBi\\)"),
        (lambda: transformers.RwkvConfig(), "keeps no key-value cache of transformers: it is recurrent"),
        (lambda: transformers.XLNetConfig(), "keeps no key-value cache of transformers"),
        (lambda: transformers.MambaConfig(), "no full-attention layer that could be compressed: it is recurrent"),
        (lambda: transformers.BertConfig(), "encoder, whose tokens attend to later ones"),
        (lambda: transformers.BertConfig(is_decoder=True, add_cross_attention=True), "has cross-attention"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        LagKVCache(config())


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="this transformers has no Dory")
def test_layers_that_are_read_past_update_keep_the_same_numbers_of_tokens():
    """Dory's earlier loops attend to the rows of the last one without asking the cache, which then fits no mask."""
    config = transformers.DoryConfig(recurrent_kv_cache_mode="last_loop")
    first, *others = LagKVCache(config).compressed_layers
    LagKVCache(config, skip_layers=[first, *others])
    for ratios in ({"skip_layers": [first]}, {"layer_keep_ratio": {first: 0.5}}):
        with pytest.raises(
            ValueError, match=r"^DoryConfig cannot have layers .* different .*: it reads rows .*'last_loop'"
        ):
            LagKVCache(config, **ratios)
        LagKVCache(transformers.DoryConfig(), **ratios)


def test_decoders_of_the_same_families_are_served():
    assert LagKVCache(transformers.FalconConfig()).compressed_layers
    assert LagKVCache(transformers.BertConfig(is_decoder=True)).compressed_layers


# -- layers that are not what their cache class says


def gpt_neo():
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=12, max_position_embeddings=512, intermediate_size=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config).eval()


def test_local_layers_of_gpt_neo_keep_every_row():
    model, ids = gpt_neo(), prompt(60, batch=2)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    assert cache.compressed_layers == (0, 2)
    forward(model, cache, ids, [40, *[1] * 20])
    report = cache.report().layers
    assert [layer.tokens_kept for layer in report][1::2] == [60, 60]
    assert max(layer.tokens_kept for layer in report[::2]) < 40
    assert [layer.kind for layer in report] == ["lagkv", "full"] * 2
    with pytest.raises(ValueError, match=r"names layer 1, which is no full-attention layer.*\[0, 2\]"):
        LagKVCache(model.config, layer_keep_ratio={1: 0.5}, **SMALL)
    with pytest.raises(ValueError, match=r"layers \[1, 3\] attend to something else than all tokens"):
        LagKVStaticCache(model.config, capacity=64, keep=2, **SMALL)


def test_local_layers_of_gpt_neo_are_not_quantized_either():
    model, ids = gpt_neo(), prompt(60)
    cache, full = (
        LagKVCache(model.config, keep=2, quantization="int8", **SMALL),
        DynamicCache(config=model.config),
    )
    forward(model, cache, ids[:, :40], [40])
    forward(model, full, ids[:, :40], [40])
    torch.testing.assert_close(cache.layers[1].keys, full.layers[1].keys)


def test_cross_attention_layers_of_mllama_keep_their_image():
    torch.manual_seed(0)
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **TINY, num_hidden_layers=4, cross_attention_layers=[1, 3], pad_token_id=0
    )
    model, ids, image = (
        transformers.MllamaForCausalLM(config).eval(),
        prompt(60),
        torch.randn(1, 50, 32),
    )  # more rows than tokens
    for layer in (1, 3):
        model.model.layers[layer].cross_attn_attn_gate.data.fill_(1.0)
    cache, full = LagKVCache(config, keep=2, **SMALL), DynamicCache(config=config)
    assert cache.compressed_layers == (0, 2)
    with torch.no_grad():
        logits = [
            model(input_ids=ids[:, :40], cross_attention_states=image, **cache_argument(x, model)).logits
            for x in (cache, full)
        ]
    torch.testing.assert_close(*logits)
    forward(model, cache, ids[:, 40:], [1] * 20)
    for layer in (1, 3):
        assert torch.equal(cache.layers[layer].keys, full.layers[layer].keys)
        assert torch.equal(cache.layers[layer].values, full.layers[layer].values)
    assert cache.report().layers[0].tokens_kept < 40
    with pytest.raises(ValueError, match=r"layers \[1, 3\] attend to something else than all tokens"):
        LagKVStaticCache(config, capacity=64, keep=2, **SMALL)
