"""Reading a context once with the full cache, forking that cache for every method, and what attention saw
on the way.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lagkv_ext import compact
from lagkv_ext.cache.fidelity import forward
from lagkv_ext.commands.evaluate.types import EvaluationError

# Queries whose attention is remembered by itself: SnapKV's observation window.
OBSERVED = 32
_BLOCK = 256  # queries whose attention weights exist at one time


@dataclass
class Attention:
    """Attention of the context's queries to its keys in one layer: ``[1, H, N]`` float32, mean over the
    heads of a group.
    """

    accumulated: Tensor  # sum over all queries (H2O)
    observed: Tensor  # sum over the last `OBSERVED` queries (SnapKV)


@dataclass
class Prefill:
    """A context as the full cache holds it. ``cache`` is never written to: every question gets a `fork`."""

    ids: Tensor  # [1, N]
    cache: Any  # transformers DynamicCache
    layers: list[int]  # full-attention layers: the ones that are compressed
    attention: dict[int, Attention] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, H, N, D]`` of a full-attention layer."""
        return self.cache.layers[layer].keys, self.cache.layers[layer].values

    def fork(self, *indices: dict[int, Tensor]) -> Any:
        """A cache to go on with: a batch of as many sequences as ``indices`` are given, or the whole cache for none.

        Each ``index[layer] [1, H, K]`` says which rows of a full-attention layer one of them holds; ``K`` is the
        same for all.
        """
        if not indices:
            return fork_cache(self.cache)
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in indices[0]:
            key, value = self.rows(layer)
            rows[layer] = (
                torch.cat([compact(key, index[layer]) for index in indices]),
                torch.cat([compact(value, index[layer]) for index in indices]),
            )
        return fork_cache(self.cache, rows, batch=len(indices))


def fork_cache(cache: Any, rows: dict[int, tuple[Tensor, Tensor]] | None = None, *, batch: int = 1) -> Any:
    """A copy of a `DynamicCache` that can be appended to without changing the original, some layers with other rows.

    ``batch`` over 1 repeats the layers without rows of their own, and needs `can_batch`.
    """
    new = copy.copy(cache)
    new.layers = []
    for i, layer in enumerate(cache.layers):
        twin = copy.copy(layer) if _by_row(layer) else copy.deepcopy(layer)
        if rows and i in rows:
            twin.keys, twin.values = rows[i]
        elif batch > 1:
            twin.keys, twin.values = (x.expand(batch, -1, -1, -1) for x in (layer.keys, layer.values))
        new.layers.append(twin)
    return new


def can_batch(cache: Any) -> bool:
    """True where every layer keeps keys and values by row, which can be repeated for a batch."""
    return all(_by_row(layer) for layer in cache.layers)


def _by_row(layer: Any) -> bool:
    """Layers that concatenate when they grow and never write in place: their tensors can be shared between forks."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def read(model: Any, ids: Tensor, layers: list[int], *, attention: bool = False) -> Prefill:
    """Run the context ``ids [1, N]`` through the model with a full `DynamicCache`.

    ``attention``: also sum the attention weights of the layers in blocks of queries, which costs one more product of
    queries and keys but never holds more than a block of weights.
    """
    from transformers import DynamicCache

    prefill = Prefill(ids, DynamicCache(config=model.config), layers)
    watch = _watched(model, prefill) if attention else contextlib.nullcontext()
    with torch.inference_mode(), watch:
        forward(model, ids, prefill.cache, position=0, logits_to_keep=1)
    if attention and set(prefill.attention) != set(layers):
        raise EvaluationError(
            f"the attention of layers {sorted(set(layers) - set(prefill.attention))} of "
            f"{type(model).__name__} could not be "
            "observed, which the methods h2o and snapkv need; leave them out with --methods"
        )
    return prefill


_RECORDING = "lagkv_evaluate_recording"


@contextlib.contextmanager
def _watched(model: Any, prefill: Prefill) -> Iterator[None]:
    """While open, the model's attention function also fills ``prefill.attention``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    config = model.config.get_text_config(decoder=True)
    original = config._attn_implementation
    if original not in ALL_ATTENTION_FUNCTIONS:
        raise EvaluationError(
            f"the methods h2o and snapkv need a model with attn_implementation 'sdpa' or "
            f"'flash_attention_*', got {original!r}"
        )
    attend = ALL_ATTENTION_FUNCTIONS[original]

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if module.layer_idx in prefill.layers:
            if options.get("s_aux") is not None:
                raise EvaluationError("the methods h2o and snapkv do not know attention with learned sinks")
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            prefill.attention[module.layer_idx] = _attention(query, key, scaling, options.get("softcap"))
        return attend(module, query, key, value, mask, **options)

    AttentionInterface.register(_RECORDING, recording)
    AttentionMaskInterface.register(_RECORDING, ALL_MASK_ATTENTION_FUNCTIONS[original])
    config._attn_implementation = _RECORDING
    try:
        yield
    finally:
        config._attn_implementation = original
        AttentionInterface._global_mapping.pop(_RECORDING)
        AttentionMaskInterface._global_mapping.pop(_RECORDING)


def _attention(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Attention:
    """Column sums of the causal attention weights of ``query [1, Hq, N, D]`` on ``key [1, H, N, D]``."""
    batch, heads, tokens, _ = key.shape
    group = query.shape[1] // heads
    accumulated = torch.zeros(batch, heads, tokens, device=key.device)
    observed = torch.zeros_like(accumulated)
    position = torch.arange(tokens, device=key.device)
    for begin in range(0, tokens, _BLOCK):
        block = query[:, :, begin : begin + _BLOCK].unflatten(1, (heads, group)).float()
        # A block of queries sees no key behind its last one.
        end = min(begin + _BLOCK, tokens)
        logits = block @ key[:, :, None, :end].float().transpose(-1, -2) * scaling
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = position[:end] > position[begin:end, None]
        weights = F.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1).mean(
            dim=2
        )  # [1, H, block, end]
        accumulated[:, :, :end] += weights.sum(dim=2)
        first = max(0, tokens - OBSERVED - begin)
        observed[:, :, :end] += weights[:, :, first:].sum(dim=2)
    return Attention(accumulated, observed)
