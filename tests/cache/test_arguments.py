"""Arguments of the caches and what goes with them: a wrong type or value is refused by name, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache, read_settings
from lagkv_ext.cache.models import admit
from lagkv_ext.serving.rollout import Store
from tests.cache.models import SMALL, forward, prompt, tiny_config, tiny_model
from tests.ops.test_arguments import NO_BOOLEAN, NO_INTEGER, NO_NUMBER, NO_TEXT

NO_INDICES = [1, None, 0.5, True]  # of layers
NO_MAPPING = [1, 0.5, [0.5], ["ab"], "x", True]
NO_TENSOR = ["0", 0.5, [0], True]
NO_PATH = [None, 3, 0.5, ["x"], b"x", True]
NO_DEVICE = ["no device", 3.5, [0], True]
NO_DTYPE = ["float32", 8, torch.int8, True]

SHARED = {
    "lag_size": [*NO_INTEGER, None],
    "keep": NO_INTEGER,
    "keep_ratio": NO_NUMBER,
    "sink_size": [*NO_INTEGER, None],
    "value_weight": [*NO_NUMBER, None],
    "score": NO_TEXT,
    "smooth": [*NO_INTEGER, None],
    "budget": NO_TEXT,
}
GROWING = {
    **SHARED,
    "max_tokens": NO_INTEGER,
    "boundary": NO_INTEGER,
    "quantization": [x for x in NO_TEXT if x is not None],
    "layer_keep_ratio": NO_MAPPING,
    "skip_layers": [*NO_INDICES, "0", b"0"],
    "offloading": NO_BOOLEAN[:-1],
    "offload_only_non_sliding": NO_BOOLEAN[:-1],
}
STATIC = {
    **SHARED,
    "capacity": [*NO_INTEGER, None],
    "step_tokens": [*NO_INTEGER, None],
    "max_batch_size": NO_INTEGER,
    "dtype": NO_DTYPE,
    "device": NO_DEVICE,
}
CLASSES = {LagKVCache: GROWING, LagKVStaticCache: STATIC}
ARGUMENTS = [
    (cls, name, value) for cls, table in CLASSES.items() for name, values in table.items() for value in values
]
#: Methods of caches that hold tokens, with arguments of which the last is wrong; the name of that one.
METHODS: list[tuple[str, str, list[Any]]] = [
    ("kept_positions", "layer", NO_INTEGER),
    ("visible_columns", "layer", NO_INTEGER),
    ("crop", "tokens_to_remove", [*NO_INTEGER, None]),
    ("reorder_cache", "beam_idx", [*NO_TENSOR, None]),
    ("set_attention_mask", "attention_mask", NO_TENSOR),
]


def small(cls: type, **arguments: Any) -> Any:
    room = {"capacity": 64} if cls is LagKVStaticCache else {}
    keep = {} if {"keep_ratio", "keep"} & set(arguments) else {"keep": 2}
    return cls(tiny_config("llama"), **{**SMALL, **keep, **room, **arguments})


def filled(cls: type) -> Any:
    model = tiny_model("llama")
    cache = small(cls)
    forward(model, cache, prompt(40, batch=2), [40])
    return cache


def refuses(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).startswith((f"{name} must be ", f"a layer index in {name} must be "))
    assert ", got " in str(caught.value)


@pytest.mark.parametrize(("cls", "name", "value"), ARGUMENTS, ids=str)
def test_a_wrong_type_is_named(cls, name, value):
    refuses(lambda: small(cls, **{name: value}), name)


@pytest.mark.parametrize("cls", [LagKVCache, LagKVStaticCache])
def test_every_argument_is_listed(cls):
    names = set(cls.__init__.__kwdefaults__) | ({"capacity"} if cls is LagKVStaticCache else set())
    assert names == set(CLASSES[cls])


def test_the_cache_of_an_encoder_decoder_hands_its_arguments_on():
    from transformers import BartConfig

    refuses(lambda: LagKVEncoderDecoderCache(BartConfig(), lag_size="8"), "lag_size")


@pytest.mark.parametrize("value", [["0"], [0.5], [[0]], [None]], ids=str)
def test_a_layer_that_is_no_index_is_named(value):
    refuses(lambda: small(LagKVCache, skip_layers=value), "skip_layers")
    if isinstance(value[0], (str, float)):
        refuses(lambda: small(LagKVCache, layer_keep_ratio={value[0]: 0.5}), "layer_keep_ratio")


def test_a_ratio_of_a_layer_that_is_no_number_is_named():
    for value in NO_NUMBER:
        refuses(lambda value=value: small(LagKVCache, layer_keep_ratio={0: value}), "layer_keep_ratio[0]")


@pytest.mark.parametrize("cls", [LagKVCache, LagKVStaticCache])
@pytest.mark.parametrize(
    "name", ["lag_size", "keep", "sink_size", "max_tokens", "boundary", "capacity", "step_tokens"]
)
def test_a_number_that_no_operator_could_take_is_named(cls, name):
    if name in CLASSES[cls]:
        with pytest.raises(ValueError, match=rf"^{name} must fit 64 bits, got"):
            small(cls, **{name: 10**30})


@pytest.mark.parametrize("cls", [LagKVCache, LagKVStaticCache])
def test_methods_name_a_wrong_type_and_change_nothing(cls):
    cache = filled(cls)
    before, rows = cache.kept_hash(), [x.keys.clone() for x in cache.layers]
    for method, name, values in METHODS:
        for value in values:
            more = (1,) if method == "visible_columns" else ()
            refuses(lambda: getattr(cache, method)(value, *more), name)
    for value in NO_INTEGER:
        refuses(lambda value=value: cache.visible_columns(0, value), "new")
    if cls is LagKVCache:
        for value in NO_INTEGER:
            refuses(lambda value=value: cache.kept_positions(0, value), "sequence")
            refuses(lambda value=value: cache.batch_repeat_interleave(value), "repeats")
        for value in NO_TENSOR:
            refuses(lambda value=value: cache.batch_select_indices(value), "indices")
            refuses(lambda value=value: cache.set_attention_mask(torch.ones(2, 41), value), "position_ids")
            refuses(lambda value=value: cache.check_attention_mask(value), "attention_mask")
        for value in NO_DEVICE:
            refuses(lambda value=value: cache.to(value), "device")
        for value in NO_DTYPE:
            refuses(lambda value=value: cache.to("cpu", value), "dtype")
    assert cache.kept_hash() == before
    assert all(torch.equal(x.keys, y) for x, y in zip(cache.layers, rows, strict=True))


def test_indices_have_one_dimension_and_are_integers():
    """A number alone, or True and False for every sequence, would leave something of another shape or order."""
    cache = filled(LagKVCache)
    for wrong in (
        torch.tensor(0),
        torch.tensor([[0, 1]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
    ):
        for method, name in (("reorder_cache", "beam_idx"), ("batch_select_indices", "indices")):
            with pytest.raises(ValueError, match=rf"^{name} must be integers \[count\], got shape .* dtype"):
                getattr(cache, method)(wrong)
    assert cache.layers[0].keys.shape[0] == 2


@pytest.mark.parametrize("cls", [LagKVCache, LagKVStaticCache])
def test_a_layer_that_is_not_there_is_named(cls):
    cache = filled(cls)
    for layer in (-4, 3, 2**40):
        for method in (cache.kept_positions, lambda x: cache.visible_columns(x, 1)):
            with pytest.raises(ValueError, match=rf"layer must be between -3 and 2, got {layer}"):
                method(layer)
    assert torch.equal(cache.kept_positions(-1), cache.kept_positions(2))


@pytest.mark.parametrize("value", NO_PATH, ids=str)
def test_a_path_that_is_none_is_named(value):
    cache = filled(LagKVCache)
    refuses(lambda: cache.save(value), "path")
    refuses(lambda: LagKVCache.load(value, tiny_config("llama")), "path")
    refuses(lambda: read_settings(value), "path")
    refuses(lambda: Store(value), "name")


@pytest.mark.parametrize("value", NO_DEVICE, ids=str)
def test_a_device_that_is_none_is_named(value, tmp_path):
    filled(LagKVCache).save(tmp_path / "x")
    refuses(lambda: LagKVCache.load(tmp_path / "x", tiny_config("llama"), device=value), "device")


@pytest.mark.parametrize("value", NO_TEXT, ids=str)
def test_a_family_is_a_name(value):
    refuses(lambda: admit(value), "model_type")
