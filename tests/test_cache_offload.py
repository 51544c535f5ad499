"""LagKVCache whose layers wait on the CPU, and in models that accelerate has spread over memories."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from cache_models import KINDS, SMALL, forward, full_layers, generate, prompt, tiny_config, tiny_model
from family_models import decoder
from transformers import DynamicCache

from lagkv_ext import LagKVCache

STEPS = [40, 3, *[1] * 25, 20, 1, 1]
needs_device = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="offloading needs a device beside the CPU"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class WaitingCache(LagKVCache):
    """Moves its layers when `Cache.update` of transformers does, without the streams of a device: the order of
    fetching, compressing and reading is that of offloading."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.layers[(layer_idx + 1) % len(self.layers)].prefetch()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        before = keys.clone(), values.clone()
        self.layers[layer_idx].offload()
        assert torch.equal(keys, before[0])  # attention reads them after the layer has gone
        assert torch.equal(values, before[1])
        return keys, values


@pytest.mark.parametrize("order", ["use_then_compress", "compress_then_use"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_goes_before_attention_has_read_it(kind, order):
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(sum(STEPS), batch=2)
    waiting, cache = (cls(model.config, keep=2, order=order, **SMALL) for cls in (WaitingCache, LagKVCache))
    logits = [forward(model, x, ids, STEPS) for x in (waiting, cache)]
    assert torch.equal(logits[0], logits[1])
    assert waiting.kept_hash() == cache.kept_hash()
    assert waiting.report().compressions >= 5


def test_padded_layers_wait_too():
    model, ids = tiny_model("llama"), prompt(50, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    texts = [
        generate(model, ids, cls(model.config, keep=2, **SMALL), attention_mask=mask)
        for cls in (WaitingCache, LagKVCache)
    ]
    assert torch.equal(texts[0], texts[1])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
def test_without_a_device_offloading_is_refused():
    with pytest.raises(ValueError, match="there is no device here"):
        LagKVCache(tiny_config("llama"), offloading=True)


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("only_non_sliding", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_as_transformers_does(kind, only_non_sliding):
    device = torch.accelerator.current_accelerator()
    model, ids = copy.deepcopy(tiny_model(kind)).to(device), prompt(50, batch=2).to(device)
    waiting = LagKVCache(
        model.config, keep=2, offloading=True, offload_only_non_sliding=only_non_sliding, **SMALL
    )
    cache = LagKVCache(model.config, keep=2, **SMALL)
    assert torch.equal(generate(model, ids, waiting), generate(model, ids, cache))
    assert waiting.kept_hash() == cache.kept_hash()
    first = full_layers(kind)[0]
    assert waiting.layers[first].storages()[0].device.type in ("cpu", device.type)
    assert any(x.device.type == "cpu" for i in full_layers(kind) for x in waiting.layers[i].storages())
    assert waiting.copy().kept_hash() == cache.kept_hash()


@needs_device
@pytest.mark.gpu
def test_hybrid_layers_cannot_be_offloaded():
    with pytest.raises(ValueError, match="transformers never fetches such layers back"):
        LagKVCache(decoder("Falcon-H1").config, offloading=True)


# -- device_map


@pytest.mark.parametrize("family", ["Llama", "Gemma 3", "Gemma 4", "Falcon-H1"])
def test_a_model_spread_over_memory_and_disk(family, tmp_path):
    """accelerate calls ``to`` of every argument of a layer, while layers to come may still read rows of those before
    (Gemma 4): nothing may move under their eyes."""
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = decoder(family), prompt(50, batch=2)
    expected = [
        generate(model, ids, cache)
        for cache in (DynamicCache(config=model.config), LagKVCache(model.config, keep=2, **SMALL))
    ]
    spread = copy.deepcopy(model)
    names = [f"model.{name}" for name, _ in spread.model.named_children() if name != "layers"]
    layers = [f"model.layers.{i}" for i in range(len(spread.model.layers))]
    places = {**dict.fromkeys(["lm_head", *names, *layers], "cpu"), "model.layers.1": "disk"}
    accelerate.dispatch_model(spread, device_map=places, main_device="cpu", offload_dir=tmp_path)
    caches = LagKVCache(model.config, keep_ratio=1, **SMALL), LagKVCache(model.config, keep=2, **SMALL)
    assert any(tmp_path.iterdir())
    for cache, text in zip(caches, expected, strict=True):
        assert torch.equal(generate(spread, ids, cache), text)


@needs_device
@pytest.mark.gpu
def test_a_model_on_two_devices():
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")
    device = torch.accelerator.current_accelerator()
    model, ids = decoder("Llama", torch.float64), prompt(50, batch=2)
    expected = generate(model, ids, LagKVCache(model.config, keep=2, **SMALL))
    spread = copy.deepcopy(model)
    names = [f"model.{name}" for name, _ in spread.model.named_children() if name != "layers"]
    places = {**dict.fromkeys(["lm_head", *names, "model.layers.1"], device), "model.layers.0": "cpu"}
    accelerate.dispatch_model(spread, device_map=places, main_device=str(device), force_hooks=True)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    assert torch.equal(generate(spread, ids.to(device), cache).cpu(), expected)
