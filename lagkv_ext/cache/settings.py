"""Settings of a cache, checked once when it is made: parameters per layer, and the models that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lagkv_ext import arguments, formulas, ops
from lagkv_ext.cache.quantized.quantizer import FORMATS


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """Settings of one full-attention layer (docs/method.md 1). ``keep == lag_size``: nothing is ever dropped.
    ``max_tokens``: rows that it may hold before a compression, see ``compression/plan.py``."""

    lag_size: int
    keep: int
    sink_size: int
    value_weight: float
    score: str
    max_tokens: int | None = None
    quantization: str | None = None  #: of the kept rows, one of `quantizer.FORMATS`
    boundary: int | None = None  #: compress only when the tokens seen are a multiple of it
    smooth: int = 1
    budget: str = "partition"

    @property
    def compresses(self) -> bool:
        return self.keep < self.lag_size

    @property
    def carries_scores(self) -> bool:
        """Tells whether chosen rows compete again, with the scores that they were chosen by."""
        return self.budget == "head"

    @property
    def most_chosen(self) -> int | None:
        """Rows behind the sink that stay when a layer with ``max_tokens`` has carried scores and is full."""
        if self.max_tokens is None or not self.carries_scores:
            return None
        return (self.max_tokens - 2 * self.lag_size - self.sink_size) // self.keep * self.keep

    @property
    def operator_arguments(self) -> dict[str, Any]:
        """Arguments of the operators beyond keys, values and start."""
        return {
            "lag_size": self.lag_size,
            "keep": self.keep,
            "value_weight": self.value_weight,
            "score": self.score,
            "smooth": self.smooth,
            "budget": self.budget,
        }

    def compressed_count(self, rows: int, start: int) -> int:
        """Partitions that lose tokens when ``rows`` rows are compressed from ``start`` on."""
        return formulas.compressed_count(rows, start, self.lag_size) if self.compresses else 0


def layer_settings(
    *,
    lag_size: int,
    keep_ratio: float | None,
    keep: int | None,
    sink_size: int,
    value_weight: float,
    score: str,
    max_tokens: int | None = None,
    quantization: str | None = None,
    boundary: int | None = None,
    smooth: int = 1,
    budget: str = "partition",
) -> LayerSettings:
    """The settings of every layer that has none of its own. ValueError or TypeError names what was wrong."""
    lag_size = arguments.integer("lag_size", lag_size, minimum=1)
    sink_size = arguments.integer("sink_size", sink_size, minimum=0)
    if keep is not None:
        if keep_ratio is not None:
            raise ValueError(
                f"give keep or keep_ratio, not both; got keep={keep} and keep_ratio={keep_ratio}"
            )
        keep = arguments.integer("keep", keep, minimum=1)
        if keep > lag_size:
            raise ValueError(f"keep must be at most lag_size ({lag_size}), got {keep}")
    else:
        keep = keep_count(
            "keep_ratio", ops.DEFAULT_KEEP_RATIO if keep_ratio is None else keep_ratio, lag_size
        )
    value_weight = arguments.finite("value_weight", value_weight)
    arguments.one_of("score", score, arguments.SCORES)
    smooth = arguments.smoothing("smooth", smooth)
    arguments.one_of("budget", budget, arguments.BUDGETS)
    if max_tokens is not None:
        max_tokens = arguments.integer("max_tokens", max_tokens)
        _check_budget("max_tokens", max_tokens, lag_size, keep, sink_size, budget)
    if quantization is not None:
        arguments.one_of("quantization", quantization, FORMATS)
    if boundary is not None:
        boundary = arguments.integer("boundary", boundary, minimum=1)
        if boundary % lag_size:
            raise ValueError(f"boundary must be a multiple of lag_size ({lag_size}), got {boundary}")
        if max_tokens is not None:
            raise ValueError(
                f"give boundary or max_tokens, not both (a layer that starts again from the sink depends on every step "
                f"so far), got boundary={boundary} and max_tokens={max_tokens}"
            )
    return LayerSettings(
        lag_size, keep, sink_size, value_weight, score, max_tokens, quantization, boundary, smooth, budget
    )


def keep_count(name: str, keep_ratio: float, lag_size: int) -> int:
    return formulas.keep_count(arguments.ratio(name, keep_ratio), lag_size)


def settings_per_layer(
    base: LayerSettings,
    full_layers: list[int],
    layer_count: int,
    layer_keep_ratio: Mapping[int, float] | None,
    skip_layers: Iterable[int],
) -> dict[int, LayerSettings]:
    """Settings of every full-attention layer; a negative index counts from the model's last layer."""
    settings = dict.fromkeys(full_layers, base)
    named: dict[int, str] = {}
    if isinstance(skip_layers, (str, bytes)) or not isinstance(skip_layers, Iterable):
        raise TypeError(f"skip_layers must be layer indices, got {arguments.described(skip_layers)}")
    if layer_keep_ratio is not None and not isinstance(layer_keep_ratio, Mapping):
        raise TypeError(
            f"layer_keep_ratio must be a mapping of layer indices to ratios, "
            f"got {arguments.described(layer_keep_ratio)}"
        )
    for index in skip_layers:
        layer = _layer_index("skip_layers", index, layer_count, named)
        # A layer of another kind is never compressed: to skip it asks for what is so already.
        if layer in settings:
            settings[layer] = dataclasses.replace(base, keep=base.lag_size)
    for index, ratio in (layer_keep_ratio or {}).items():
        layer = _layer_index("layer_keep_ratio", index, layer_count, named)
        if layer not in settings:
            raise ValueError(
                f"layer_keep_ratio names layer {index}, which is no full-attention layer; "
                f"the full-attention layers of this model are {full_layers}"
            )
        keep = keep_count(f"layer_keep_ratio[{index}]", ratio, base.lag_size)
        settings[layer] = dataclasses.replace(base, keep=keep)
    return settings


def with_capacity(settings: LayerSettings, capacity: int, step_tokens: int) -> LayerSettings:
    """The settings of a layer that has memory for ``capacity`` rows, of which steps of up to ``step_tokens`` tokens
    never need more."""
    capacity, step_tokens = (
        arguments.integer("capacity", capacity),
        arguments.integer("step_tokens", step_tokens, minimum=1),
    )
    least = settings.sink_size + 2 * settings.lag_size + step_tokens - 1
    if capacity < least:
        raise ValueError(
            f"capacity must be at least {least}: sink_size ({settings.sink_size}) + two partitions of lag_size "
            f"({settings.lag_size}) tokens + step_tokens ({step_tokens}) - 1, got {capacity}"
        )
    max_tokens = capacity - step_tokens + 1
    _check_budget(
        "capacity", max_tokens, settings.lag_size, settings.keep, settings.sink_size, settings.budget
    )
    # No compression drops less, so one is enough for a step.
    most = settings.lag_size - settings.keep
    if step_tokens > most:
        raise ValueError(
            f"step_tokens must be at most {most}: lag_size ({settings.lag_size}) - keep ({settings.keep}), what a "
            f"compression makes room for, got {step_tokens}"
        )
    return dataclasses.replace(settings, max_tokens=max_tokens)


def _layer_index(name: str, index: Any, layer_count: int, named: dict[int, str]) -> int:
    index = arguments.integer(f"a layer index in {name}", index)
    if not -layer_count <= index < layer_count:
        raise ValueError(
            f"{name} must hold layer indices between {-layer_count} and {layer_count - 1}, got {index}"
        )
    layer = index % layer_count
    if layer in named:
        raise ValueError(f"layer {layer} is named twice: by {named[layer]} and by {name} (as {index})")
    named[layer] = name
    return layer


def _check_budget(name: str, max_tokens: int, lag_size: int, keep: int, sink_size: int, budget: str) -> None:
    """ValueError unless a layer of ``max_tokens`` rows has room for the sink and two partitions, and drops some."""
    least = sink_size + 2 * lag_size
    if max_tokens < least:
        raise ValueError(
            f"{name} must be at least {least}: sink_size ({sink_size}) + two partitions of lag_size ({lag_size}) "
            f"tokens, got {max_tokens}"
        )
    if keep == lag_size:
        raise ValueError(
            f"{name} ({max_tokens}) needs a keep below lag_size ({lag_size}), got {keep}: where every token of a "
            "partition is kept, no number of compressions makes room"
        )
    if budget == "head" and max_tokens < least + keep:
        raise ValueError(
            f"{name} must be at least {least + keep} with budget='head': the sink, two partitions, and keep ({keep}) "
            f"rows that stay, got {max_tokens}"
        )
