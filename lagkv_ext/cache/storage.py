"""Caches in files: a compressed prefix is saved, loaded, and goes on as if it had never left the memory."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lagkv_ext import arguments
from lagkv_ext.cache.layer_state import LayerState, WrongState, restore, state_of
from lagkv_ext.settings_file import without_order

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORMAT = "lagkv_ext.cache"
VERSION = 1
# Rows of a model that differs in one of these mean something else, or nothing, to another one.
_MODEL = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)

Self = TypeVar("Self", bound="StoredInFiles")


class StoredInFiles:
    """The part of a cache that saves, loads and copies it."""

    layers: list
    _model: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Write what the cache holds to a safetensors file, which is there as a whole or not at all.

        In it are the rows of every layer, sliding windows and states of linear attention too; positions; settings;
        and the numbers from which compression goes on. Not in it is the token that `generate` has chosen last and not
        yet given to the model.

        Raises:
            ValueError: a cache with a layer that cannot be saved, named with the reason.
        """
        from safetensors.torch import save_file

        path = arguments.path("path", path)
        self._check_can_be_stored()
        states = {}
        for i, layer in enumerate(self.layers):
            try:
                states[i] = state_of(layer)
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from None
        about = {"model": self._model, "layers": [state.numbers for state in states.values()]}
        tensors = {
            f"layers.{i}.{name}": x.detach().to("cpu").contiguous()
            for i, state in states.items()
            for name, x in state.tensors.items()
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "cache": json.dumps(about)}
        path = os.fspath(path)
        handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".unfinished")
        os.close(handle)
        try:
            save_file(tensors, unfinished, metadata)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike,
        config: PreTrainedConfig,
        *,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> Self:
        """The cache that was saved, with the settings that it was made with.

        Args:
            path: what `save` wrote.
            config: ``model.config`` of the model that it is for.
            device: where its tensors come to lie.
            settings: arguments of the class. Those that say how it compresses must be those that the saved cache was
                made with, and come from the file when not given.

        Raises:
            FileNotFoundError, ValueError: no such file; not a file of `save`, or a damaged one; of another format
                version, model, or settings. The message says which, with both values.
        """
        path = arguments.path("path", path)
        about, tensors = _read(path, arguments.device("device", device))
        model = describe_model(config)
        if about["model"] != model:
            theirs = about["model"]
            different = [
                f"{k} {theirs.get(k)!r} (here: {model[k]!r})" for k in model if theirs.get(k) != model[k]
            ]
            raise ValueError(f"{os.fspath(path)} was saved for another model: {', '.join(different)}")
        try:
            make: Callable[..., Self] = cls
            cache = make(config, **{**_arguments(about["layers"], settings), **settings})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} cannot be loaded with these settings: {error}") from error
        if len(about["layers"]) != len(cache.layers):
            raise ValueError(
                f"{os.fspath(path)} has {len(about['layers'])} layers, this model has {len(cache.layers)}"
            )
        batches = {x.shape[0] for x in tensors.values()}
        if len(batches) > 1:
            raise ValueError(f"{os.fspath(path)} is damaged: its layers have batch sizes {sorted(batches)}")
        for i, layer in enumerate(cache.layers):
            prefix = f"layers.{i}."
            own = {
                name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)
            }
            try:
                restore(layer, LayerState(own, about["layers"][i]))
            except WrongState as error:
                raise ValueError(f"{os.fspath(path)}, layer {i}: {error}") from None
        if tensors:
            raise ValueError(f"{os.fspath(path)} is damaged: it has tensors of no layer: {sorted(tensors)}")
        return cache

    def copy(self: Self) -> Self:
        """A cache that goes on from here by itself: one prefix, several continuations. Same as `copy.deepcopy`."""
        return copy.deepcopy(self)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            # The stream on which offloaded layers come back is one of the device, not of the cache.
            setattr(twin, name, value if name == "prefetch_stream" else copy.deepcopy(value, memo))
        return twin

    def _check_can_be_stored(self) -> None:
        """ValueError where more belongs to this cache than its layers."""


def describe_model(config: PreTrainedConfig) -> dict[str, Any]:
    """JSON of everything that the rows of a cache depend on."""
    text = config.get_text_config(decoder=True)
    # The configuration as a whole does not answer where layers differ.
    layers = getattr(text, "per_layer_config", [text])
    found = {}
    for name in _MODEL:
        values = [getattr(layer, name, None) for layer in layers]
        found[name] = values[0] if all(x == values[0] for x in values) else values
    return json.loads(json.dumps(found, default=str))


def _read(path: str | os.PathLike, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no saved cache: its format is {metadata.get('format')!r}, expected {FORMAT!r}"
                )
            if metadata.get("version") != str(VERSION):
                raise ValueError(
                    f"{path} has version {metadata.get('version')} of the format, this library reads {VERSION}"
                )
            about = json.loads(metadata.get("cache", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no dictionary
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its metadata are no JSON ({error})") from error
    shaped = isinstance(about, dict) and isinstance(about.get("model"), dict)
    if not shaped or not all(isinstance(x, dict) for x in about.get("layers") or [None]):
        raise ValueError(f"{path} is damaged: its metadata do not describe a model and layers")
    for i, layer in enumerate(about["layers"]):
        if isinstance(layer.get("settings"), dict):
            layer["settings"] = without_order(layer["settings"], f"{path}, layer {i}")
    return about, tensors


def _arguments(layers: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `LagKVCache` for the settings of these layers; how much is kept: unless ``given`` says it in one
    of its ways. ValueError where no layer has settings."""
    settings = {i: x["settings"] for i, x in enumerate(layers) if isinstance(x.get("settings"), dict)}
    if not settings:
        raise ValueError("no layer has settings")
    base = min(settings.values(), key=lambda x: x["keep"])
    # The ratio in the middle of those that mean this number of tokens.
    ratios = {
        i: min((x["keep"] + 0.5) / x["lag_size"], 1.0)
        for i, x in settings.items()
        if x["keep"] != base["keep"]
    }
    arguments = {**base, "layer_keep_ratio": ratios}
    if given.keys() & {"keep", "keep_ratio", "layer_keep_ratio", "skip_layers"}:
        del arguments["keep"], arguments["layer_keep_ratio"]
    return arguments
