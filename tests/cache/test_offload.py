"""LagKVCache whose layers wait on the CPU, and in models that accelerate has spread over memories."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import DynamicCache

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.families import decoder
from tests.cache.models import (
    KINDS,
    SMALL,
    forward,
    full_layers,
    generate,
    prompt,
    since,
    tiny_config,
    tiny_model,
)

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_goes_before_attention_has_read_it(kind):
    model, ids = tiny_model(kind, "sdpa", torch.float64), prompt(sum(STEPS), batch=2)
    waiting, cache = (cls(model.config, keep=2, **SMALL) for cls in (WaitingCache, LagKVCache))
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


class LateCopy:
    """In place of the event that `RowLayer.offload` leaves: until the host waits, the memory holds other things."""

    def __init__(self, layer):
        self.tensors = layer.storages()
        self.arriving = [x.clone() for x in self.tensors]
        self.waits = 0
        for x in self.tensors:
            x.fill_(1)

    def synchronize(self):
        self.waits += 1
        for x, y in zip(self.tensors, self.arriving, strict=True):
            x.copy_(y)


READS = {
    "keys": lambda layer: layer.keys,
    "values": lambda layer: layer.values,
    "kept_positions": lambda layer: layer.kept_positions(),
    "update": lambda layer: layer.update(*torch.ones(2, 2, 2, 1, 16))[1],
    "reorder_cache": lambda layer: layer.reorder_cache(torch.tensor([1, 0])) or layer.keys,
    "crop": lambda layer: layer.crop(-2) or layer.keys,
    "to": lambda layer: layer.to(None, torch.float32) or layer.values,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"padding": True}], ids=str)
def test_whoever_reads_waits_for_rows_on_their_way_to_the_cpu(options, read):
    options = dict(options)
    model, ids = tiny_model("llama"), prompt(45, batch=2)
    mask = torch.ones_like(ids)
    if options.pop("padding", False):
        mask[0, :9] = 0
    found = []
    for late in (True, False):
        cache = LagKVCache(model.config, keep=2, **SMALL, **options)
        with torch.no_grad():
            model(ids, attention_mask=mask, **cache_argument(cache))
        layer = cache.layers[0]
        copy_ = LateCopy(layer) if late else None
        layer._arrival = copy_
        found.append(READS[read](layer).clone())
        assert copy_ is None or copy_.waits > 0
    assert torch.equal(*found)


@needs_device
@pytest.mark.gpu
def test_rows_are_read_on_the_cpu_only_when_they_are_there():
    if torch.accelerator.current_accelerator().type != "cuda":
        pytest.skip("makes a CUDA stream wait")
    model, ids = copy.deepcopy(tiny_model("llama")).to("cuda"), prompt(45).to("cuda")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    layer = cache.layers[0]
    expected = layer.keys.cpu()
    torch.cuda._sleep(2_000_000_000)  # about a second in which the copy has not begun
    layer.offload()
    assert torch.equal(layer.keys, expected)
    torch.cuda._sleep(2_000_000_000)
    layer.prefetch()
    assert torch.equal(layer.keys.cpu(), expected)


@pytest.mark.no_gpu
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


@pytest.mark.parametrize(
    "family",
    [
        "Llama",
        "Gemma 3",
        pytest.param("Gemma 4", marks=since(5, 23, reason="no device_map for layers that share rows")),
        "Falcon-H1",
    ],
)
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
