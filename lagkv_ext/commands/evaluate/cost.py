"""Memory and cost of serving a model with a full and with a compressed cache: formulas, each shown with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lagkv_ext import keep_count, output_length
from lagkv_ext.commands.evaluate.types import Setting
from lagkv_ext.commands.models import full_attention_layers


@dataclass(frozen=True)
class Shape:
    """Properties of a model that decide its cache's size. ``window``: rows of a sliding-window layer, None without."""

    layers: int
    full_layers: int
    kv_heads: int
    head_dim: int
    element_size: int
    weight_bytes: int
    window: int | None = None

    @classmethod
    def from_header(cls, shape: dict[str, Any]) -> Shape:
        window = shape.get("sliding_window")
        return cls(
            shape["layers"],
            len(shape["full_layers"]),
            shape["kv_heads"],
            shape["head_dim"],
            shape["element_size"],
            shape["weight_bytes"],
            # transformers keeps one row less than the window: the new token is the last of it.
            window - 1 if window else None,
        )

    @classmethod
    def from_config(cls, config: Any, *, element_size: int, weight_bytes: int) -> Shape:
        """Builds it from a transformers configuration and the bytes of the weights, which need not be here."""
        return cls.from_header(
            shape_of(config) | {"element_size": element_size, "weight_bytes": weight_bytes}
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer: ``2 * kv_heads * head_dim * element_size`` (keys and values)."""
        return 2 * self.kv_heads * self.head_dim * self.element_size


def shape_of(config: Any) -> dict[str, Any]:
    """The sizes of a transformers configuration that decide its cache's size."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        "layers": text.num_hidden_layers,
        "full_layers": full_attention_layers(config),
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "sliding_window": getattr(text, "sliding_window", None),
    }


@dataclass(frozen=True)
class Machine:
    """A GPU: memory and bandwidth in bytes (per second), price per hour in any currency (None: only ratios
    are given).
    """

    memory: float = 80e9
    bandwidth: float = 3.35e12
    price: float | None = None
    usable: float = 0.9  # of the memory: the rest is for activations and fragmentation


@dataclass(frozen=True)
class Cost:
    """One cache in service, from formulas alone."""

    rows: int  # of a full-attention layer
    full_layer_bytes: int  # per sequence
    cache_bytes: int  # per sequence, sliding-window layers included
    sequences: int  # that fit on the GPU
    batch: int  # that the speed is for
    tokens_per_s: float  # bound by memory bandwidth
    per_million: float | None  # price of a million generated tokens


def rows(setting: Setting, tokens: int) -> int:
    """Rows of a full-attention layer after ``tokens`` tokens: ``sink + k (P - 1) + L + remainder``;
    recursion does not change it.
    """
    if setting.method == "full":
        return tokens
    keep = keep_count(setting.keep_ratio, setting.lag_size)
    return output_length(tokens, setting.sink_size, setting.lag_size, keep)


def cost(
    shape: Shape, setting: Setting, *, context: int, machine: Machine | None = None, batch: int | None = None
) -> Cost:
    """Cost of decoding at ``context`` tokens. ``batch``: sequences at a time; as many as fit by default.

    A decode step reads the weights once and every sequence's cache once, so no step is faster than
    ``(weight_bytes + batch * cache_bytes) / bandwidth``.
    """
    machine = machine or Machine()
    held = rows(setting, context)
    full = shape.full_layers * held * shape.row_bytes
    others = (shape.layers - shape.full_layers) * min(context, shape.window or context) * shape.row_bytes
    room = machine.usable * machine.memory - shape.weight_bytes
    sequences = max(0, int(room // (full + others)))
    used = min(batch, sequences) if batch else sequences
    speed = used * machine.bandwidth / (shape.weight_bytes + used * (full + others)) if used else 0.0
    price = machine.price / (3600 * speed) * 1e6 if machine.price is not None and speed else None
    return Cost(held, full, full + others, sequences, used, speed, price)


FORMULAS = (
    "bytes of a token in a layer = 2 (keys, values) x KV heads x head dim x bytes per number",
    "rows kept = sink + keep x (P - 1) + L + remainder, P = (context - sink) // L partitions, keep = keep_ratio x L",
    "cache of a sequence = full-attention layers x rows kept x bytes + sliding-window layers x "
    "min(context, window - 1) x bytes",
    "sequences per GPU = (usable share x memory - weights) / cache of a sequence",
    "decode bound = batch x bandwidth / (weights + batch x cache of a sequence)",
    "cost of a million tokens = price per hour / (3600 x tokens per second) x 1,000,000",
)


@dataclass(frozen=True)
class Check:
    """The formula against the bytes of the tensors that were really held."""

    records: int
    largest_error: float  # relative


def check(shape: Shape, records: Sequence[dict[str, Any]]) -> Check:
    """Compare the bytes of full-attention layers for every record whose setting the formula covers."""
    errors = []
    for record in records:
        setting = Setting.from_json(record["setting"])
        if any(k == "as_L" or k.startswith("layer") for k, _ in setting.options):
            continue
        expected = shape.full_layers * rows(setting, record["tokens"]) * shape.row_bytes
        errors.append(abs(expected - record["full_layer_bytes"]) / record["full_layer_bytes"])
    return Check(len(errors), max(errors, default=0.0))
