"""LagKVCache when it is made: every wrong argument and unfit model is refused there; reports; the lazy import."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Mistral3Config,
    MistralConfig,
    T5Config,
)
from transformers.cache_utils import LinearAttentionLayer

from lagkv_ext import LagKVCache
from lagkv_ext.cache import OLDEST
from tests.cache.models import SMALL, forward, prompt, tiny_config, tiny_model


def settings_of(cache, layer=0):
    return cache.layers[layer].settings


# -- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score": "attention"}, ValueError, "score must be 'std' or 'cosine' or 'blend', got 'attention'"),
        ({"score": None}, TypeError, "score must be a string, got None"),
        ({"keep_ratio": 0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0"),
        ({"keep_ratio": 1.01}, ValueError, r"keep_ratio must be in \(0, 1\], got 1.01"),
        ({"keep_ratio": float("nan")}, ValueError, r"keep_ratio must be in \(0, 1\], got nan"),
        ({"keep_ratio": "half"}, TypeError, "keep_ratio must be a number, got 'half'"),
        ({"keep_ratio": {0: 0.5}}, TypeError, r"keep_ratio must be a number, got \{0: 0.5\}"),
        ({"keep": 129}, ValueError, r"keep must be at most lag_size \(128\), got 129"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"keep": 2.0}, TypeError, "keep must be an integer, got 2.0"),
        ({"keep": 3, "keep_ratio": 0.5}, ValueError, "keep or keep_ratio, not both; got keep=3 and keep_ratio=0.5"),
        ({"lag_size": 0}, ValueError, "lag_size must be at least 1, got 0"),
        ({"lag_size": True}, TypeError, "lag_size must be an integer, got True"),
        ({"sink_size": -1}, ValueError, "sink_size must be at least 0, got -1"),
        ({"value_weight": float("inf")}, ValueError, "value_weight must be finite, got inf"),
        ({"smooth": 2}, ValueError, "smooth must be odd, got 2"),
        ({"smooth": -1}, ValueError, "smooth must be at least 1, got -1"),
        ({"smooth": 3.0}, TypeError, "smooth must be an integer, got 3.0"),
        ({"budget": "layer"}, ValueError, "budget must be 'partition' or 'head', got 'layer'"),
        ({"budget": "head", "max_tokens": 303}, ValueError,
         r"max_tokens must be at least 304 with budget='head': the sink, two partitions, and keep \(32\) rows"),
        ({"value_weight": None}, TypeError, "value_weight must be a number, got None"),
        ({"order": "use_then_compress"}, TypeError, "unexpected keyword argument 'order'"),
        ({"skip_layers": [3]}, ValueError, "skip_layers must hold layer indices between -3 and 2, got 3"),
        ({"skip_layers": [-4]}, ValueError, "skip_layers must hold layer indices between -3 and 2, got -4"),
        ({"skip_layers": ["0"]}, TypeError, "a layer index in skip_layers must be an integer, got '0'"),
        ({"skip_layers": [2, -1]}, ValueError, r"layer 2 is named twice: by skip_layers and by skip_layers \(as -1\)"),
        ({"layer_keep_ratio": {7: 0.5}}, ValueError, "layer_keep_ratio must hold layer .* between -3 and 2, got 7"),
        ({"layer_keep_ratio": {1: 2}}, ValueError, r"layer_keep_ratio\[1\] must be in \(0, 1\], got 2"),
        (
            {"layer_keep_ratio": {0: 0.5}, "skip_layers": [0]},
            ValueError,
            r"layer 0 is named twice: by skip_layers and by layer_keep_ratio \(as 0\)",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LagKVCache(tiny_config("llama"), **arguments)


def test_defaults_are_the_papers():
    settings = settings_of(LagKVCache(tiny_config("llama")))
    assert dataclasses.asdict(settings) == {
        "lag_size": 128,
        "keep": 32,
        "sink_size": 16,
        "value_weight": 1.0,
        "score": "std",
        "max_tokens": None,
        "quantization": None,
        "boundary": None,
        "smooth": 1,
        "budget": "partition",
    }


def test_layers_with_settings_of_their_own():
    cache = LagKVCache(
        tiny_config("gemma3"), keep_ratio=0.5, layer_keep_ratio={-1: 0.25}, skip_layers=[0, -2]
    )
    assert (settings_of(cache, 1).keep, settings_of(cache, 3).keep) == (
        64,
        32,
    )  # 0 and 2 are sliding: skipped anyway
    cache = LagKVCache(tiny_config("llama"), keep=7, layer_keep_ratio={0: 1e-9}, skip_layers=[-1])
    assert [settings_of(cache, i).keep for i in range(3)] == [1, 7, 128]
    assert cache.compressed_layers == (0, 1)


# -- models


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "llama"}, TypeError, "config must be a transformers configuration, got dict"),
        (tiny_model("llama"), TypeError, r"got LlamaForCausalLM \(pass model.config\)"),
        (MistralConfig(sliding_window=16, num_hidden_layers=2), ValueError,
         "MistralConfig has no full-attention layer .* 2 layers are DynamicSlidingWindowLayer"),
        (T5Config(), ValueError, r"T5Config \(model_type 't5'\) is an encoder-decoder model"),
        (DeepseekV3Config(num_hidden_layers=2), ValueError, r"latent attention \(kv_lora_rank=512\)"),
        (BloomConfig(), ValueError, "bias from row numbers"),
        (FalconConfig(alibi=True), ValueError, "bias from row numbers"),
    ],
)  # fmt: skip
def test_models_it_does_not_serve(config, error, message):
    with pytest.raises(error, match=message):
        LagKVCache(config)


def test_a_ratio_for_a_layer_that_is_not_compressed_is_refused():
    with pytest.raises(
        ValueError, match=r"names layer -2, which is no full-attention layer; .* are \[1, 3\]"
    ):
        LagKVCache(tiny_config("gemma3"), layer_keep_ratio={-2: 0.5})


def test_flex_attention_has_one_block_mask_for_all_layers():
    LagKVCache(tiny_config("llama", "flex_attention"))
    with pytest.raises(ValueError, match="block mask of flex_attention"):
        LagKVCache(tiny_config("llama", "flex_attention"), skip_layers=[0])


def test_a_multimodal_config_stands_for_its_text_model():
    config = Mistral3Config(text_config=MistralConfig(sliding_window=None, num_hidden_layers=5))
    assert LagKVCache(config).compressed_layers == (0, 1, 2, 3, 4)


def test_layers_without_attention_keep_their_own_cache():
    """Convolution layers between full-attention layers (LFM2): compressed there, left alone here."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    model = Lfm2ForCausalLM(config).double().eval()
    cache = LagKVCache(config, keep=2, **SMALL)
    assert [isinstance(layer, LinearAttentionLayer) for layer in cache.layers] == [True, False, True, False]
    logits = forward(model, cache, prompt(70), [40, 3, 27])
    assert [x.compressions for x in cache.report().layers] == [0, 2, 0, 2]
    one_by_one = LagKVCache(config, keep=2, **SMALL)
    other = forward(model, one_by_one, prompt(70), [40, *[1] * 3, 27])
    torch.testing.assert_close(logits, other, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == one_by_one.get_seq_length() == 70


# -- reports


def test_report_adds_up():
    cache = LagKVCache(tiny_config("gemma3"), keep=2, **SMALL)
    assert cache.report().tokens_seen == cache.report().bytes_held == 0
    forward(tiny_model("gemma3"), cache, prompt(100, batch=2), [100])
    report = cache.report()
    rows = 4 + 2 * 11 + 8 + 0  # sink, 11 of 12 partitions, the last one, no remainder
    compressed = report.layers[1]
    row_bytes = 2 * 2 * (16 + 16) * 4  # batch, heads, key and value dims, float32
    assert dataclasses.asdict(compressed) == {
        "layer": 1,
        "kind": "lagkv",
        "tokens_seen": 100,
        "tokens_kept": rows,
        "bytes_held": rows * row_bytes + 2 * 2 * 22 * 4,  # and the int32 positions of the chosen rows
        "bytes_uncompressed": 100 * row_bytes,
        "compressions": 1,
    }
    assert report.tokens_seen == 100
    assert report.tokens_kept == rows
    assert report.compressions == 2
    assert report.bytes_held == sum(x.bytes_held for x in report.layers)
    assert report.bytes_saved == 2 * compressed.bytes_saved == report.bytes_uncompressed - report.bytes_held
    with pytest.raises(dataclasses.FrozenInstanceError):
        compressed.tokens_seen = 0


def test_report_as_table_and_as_json():
    cache = LagKVCache(tiny_config("llama"), keep=2, skip_layers=[0], **SMALL)
    forward(tiny_model("llama"), cache, prompt(100), [100])
    report = cache.report()
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "kind",
        "seen",
        "kept",
        "MB",
        "held",
        "MB",
        "full",
        "MB",
        "saved",
        "compressions",
    ]
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["0", "full", "100", "100"],
        ["1", "lagkv", "100", "34"],
        ["2", "lagkv", "100", "34"],
    ]
    assert lines[4].split()[:3] == ["all", "100", "56"]
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["bytes_saved"] == report.bytes_saved
    assert loaded["layers"][1]["tokens_kept"] == 34
    assert loaded["layers"][1]["bytes_saved"] == report.layers[1].bytes_saved


def test_report_does_not_touch_the_rows():
    """Asked in the middle of a forward pass, it must not run a compression under the eyes of attention."""
    cache = LagKVCache(tiny_config("llama"), keep=2, **SMALL)
    forward(tiny_model("llama"), cache, prompt(35), [34, 1])
    key, value = (torch.randn(1, 2, 1, 16) for _ in range(2))
    cache.set_attention_mask(None)
    returned = cache.update(key, value, 0)
    before = [x.clone() for x in returned]
    assert cache.report().layers[0].compressions == 2
    assert cache.report().layers[0].tokens_kept < returned[0].shape[2]
    assert all(torch.equal(a, b) for a, b in zip(returned, before, strict=True))


def test_the_hash_tells_kept_sets_apart():
    def run(kind="qwen3", seed=0, chunks=(60,), **arguments):
        cache = LagKVCache(tiny_config(kind), **{"keep": 2, **SMALL, **arguments})
        forward(tiny_model(kind), cache, prompt(60, seed=seed), list(chunks))
        return cache.kept_hash()

    assert run() == run()
    hashes = [run(), run(seed=1), run(keep=3), run(score="cosine"), run(sink_size=3), run(skip_layers=[1])]
    assert len({*hashes, LagKVCache(tiny_config("qwen3")).kept_hash()}) == 7
    assert all(len(x) == 32 and int(x, 16) for x in hashes)


def test_kept_positions_of_other_layers_are_refused():
    cache = LagKVCache(tiny_config("gemma3"), **SMALL)
    with pytest.raises(ValueError, match=r"one of the full-attention layers \[1, 3\], got 0"):
        cache.kept_positions(0)
    with pytest.raises(ValueError, match="has seen no token yet"):
        cache.kept_positions(-1)
    forward(tiny_model("gemma3"), cache, prompt(30), [30])
    assert torch.equal(cache.kept_positions(-1), cache.kept_positions(3))


def test_to_moves_the_whole_cache():
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, cache, prompt(60), [60])
    before = cache.kept_hash()
    assert cache.to(dtype=torch.float64) is cache
    forward(tiny_model("llama", dtype=torch.float64), cache, prompt(5), [5])
    assert cache.to("cpu").layers[0].keys.dtype == torch.float64
    assert cache.get_seq_length() == 65
    assert cache.kept_hash() != before


# -- import


def test_the_package_needs_transformers_only_for_the_cache():
    code = """
import sys
from pathlib import Path
import lagkv_ext
assert "transformers" not in sys.modules
assert "LagKVCache" in dir(lagkv_ext)
sys.modules["transformers"] = None  # what an import finds where it is not installed
try:
    lagkv_ext.LagKVCache
except ImportError as error:
    assert "pip install 'lagkv_ext[transformers]'" in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", ["4.57.1", "5.9.0"])
def test_an_old_transformers_is_refused(version):
    code = f"""
import sys, types
sys.modules["transformers"] = types.SimpleNamespace(__version__="{version}")
import lagkv_ext
try:
    lagkv_ext.LagKVCache
except ImportError as error:
    assert "transformers >= 5.18" in str(error) and "got {version}" in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oldest_transformers_is_that_of_the_package():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert f'"transformers>={OLDEST}"' in pyproject.read_text(encoding="utf-8")


def test_gemma_without_sliding_layers_is_like_any_other():
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert LagKVCache(config).compressed_layers == (0, 1)
