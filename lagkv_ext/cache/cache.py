"""``LagKVCache``: the cache that is handed to a transformers model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

from lagkv_ext.cache.hybrid import LagKVHybridLayer
from lagkv_ext.cache.layer import LagKVLayer
from lagkv_ext.cache.mask import FittingMask, refuse_padding
from lagkv_ext.cache.report import ReportsLayers
from lagkv_ext.cache.settings import check_config, layer_settings, settings_per_layer
from lagkv_ext.cache.storage import StoredInFiles, describe_model

# Before transformers 5.16: crop also took the length to crop to, and masks knew nothing of a query offset.
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
_HAS_QUERY_OFFSET = hasattr(Cache, "get_query_offset")


class LagKVCache(ReportsLayers, StoredInFiles, DynamicCache):
    """Key-value cache for transformers models, compressed by LagKV as it grows (arXiv 2504.04704).

    Use it where a `DynamicCache` would be used: ``model.generate(..., past_key_values=LagKVCache(model.config))``.
    Full-attention layers are compressed recursively, in the prompt (in one piece or in chunks) and in decoding:
    whenever two full partitions have come together, every partition but the last loses all but its ``keep`` best
    tokens. Layers of other kinds (sliding window, chunked, linear attention, shared) keep the cache that `DynamicCache`
    gives them. ``get_seq_length()`` counts the tokens seen; how many rows a layer still holds is in `report`.

    Args:
        config: ``model.config`` of a decoder-only model (others: `LagKVEncoderDecoderCache`).
        lag_size: tokens per partition, at least 1.
        keep_ratio: share kept of each partition, in (0, 1]; default 0.25. Exclusive with ``keep``. With 1 nothing is
            ever dropped and generation is that of `DynamicCache`.
        keep: tokens kept of each partition, ``1 <= keep <= lag_size``.
        sink_size: leading tokens that are always kept, at least 0.
        score: "std" (the paper) or "cosine".
        value_weight: weight of the value score against the key score, finite.
        order: "use_then_compress" (the paper): attention of a step sees the cache as it was before the compression
            that this step sets off. "compress_then_use": it sees the result, but always every token of its own step, or
            tokens would look at what comes after them; so a prompt given in one piece is attended in full. Both
            drop the same tokens, given the same keys and values.
        layer_keep_ratio: layers with a ``keep_ratio`` of their own, ``{layer: ratio}``; a negative index counts from
            the last layer of the model; only full-attention layers.
        skip_layers: layers that are never compressed; negative indices as above.
        max_tokens: rows that a compressed layer may hold, at least ``sink_size + 2 lag_size``; by default there is
            no bound, and a layer grows by ``keep`` rows for every ``lag_size`` tokens. A compression that leaves
            no room for the next one makes the layer start again from the sink: the next one chooses among
            all rows after it, as if they were a new sequence. Tokens given one by one never take a layer over it;
            many at once do for the step that brings them.

    Raises:
        TypeError, ValueError: when made: a wrong argument, a config that is no transformers configuration, or a
            model that it does not serve: no full-attention layer, encoder-decoder, multi-head latent attention,
            attention biases that count rows (ALiBi).

    Limits, each refused when met: batches with padding (`check_attention_mask`); states that require grad (run under
    ``torch.no_grad()``); `crop` into what a compression left. A custom 4-D attention mask must have as many
    columns as `get_mask_sizes` says. Read `kept_positions` and `kept_hash` between forward passes, not inside one.
    """

    _part_of_encoder_decoder = False

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        lag_size: int = 128,
        keep_ratio: float | None = None,
        keep: int | None = None,
        sink_size: int = 16,
        score: str = "std",
        value_weight: float = 1.0,
        order: str = "use_then_compress",
        layer_keep_ratio: Mapping[int, float] | None = None,
        skip_layers: Iterable[int] = (),
        max_tokens: int | None = None,
    ):
        check_config(config, self._part_of_encoder_decoder)
        base = layer_settings(
            lag_size=lag_size,
            keep_ratio=keep_ratio,
            keep=keep,
            sink_size=sink_size,
            value_weight=value_weight,
            score=score,
            order=order,
            max_tokens=max_tokens,
        )
        super().__init__(config=config)
        self._model = describe_model(config)
        kinds_compressed = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
        full_layers = [i for i, layer in enumerate(self.layers) if type(layer) in kinds_compressed]
        if not full_layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(
                f"{type(config).__name__} has no full-attention layer that could be compressed; the caches of its "
                f"{len(self.layers)} layers are {', '.join(kinds)}"
            )
        settings = settings_per_layer(base, full_layers, len(self.layers), layer_keep_ratio, skip_layers)
        for i in full_layers:
            before = self.layers[i]
            self.layers[i] = (
                LagKVLayer(settings[i])
                if type(before) is DynamicLayer
                else LagKVHybridLayer(settings[i], before.number_of_states)
            )
        self._compresses = any(x.compresses for x in settings.values())
        # Layers with linear and full attention in one are not compressed, but share the mask of full-attention layers.
        self._sharing_mask = tuple(
            i
            for i, layer in enumerate(self.layers)
            if isinstance(layer, CacheLayerMixin) and not getattr(layer, "is_sliding", False)
        )
        self._uniform = len({settings.get(i) for i in self._sharing_mask}) == 1
        attention = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
        if not self._uniform and attention == "flex_attention":
            raise ValueError(
                "layers that keep different numbers of tokens (layer_keep_ratio, skip_layers) cannot share the block "
                "mask of flex_attention; use the attention implementation sdpa, eager or flash_attention_2"
            )
        if not self._uniform and not _HAS_QUERY_OFFSET:
            raise ValueError(
                "layers that keep different numbers of tokens (layer_keep_ratio, skip_layers) need a transformers "
                f"whose masks have a query offset (5.16 has), this is {transformers.__version__}"
            )

    # -- masks

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """``(columns, position of the first)`` of the attention mask for ``query_length`` new tokens.

        A full-attention layer answers for all of them, since they share one mask: with the longest (see `FittingMask`).
        """
        if self._compresses and not torch.compiler.is_compiling():
            # transformers never shows a cache the attention mask, and a padded batch would go wrong without a word. So
            # look at the mask of the function that builds masks, which is what asks for sizes; where a version of
            # transformers names it otherwise, nothing is found here (and a test fails).
            refuse_padding(sys._getframe(1).f_locals.get("attention_mask"))
        if layer_idx not in self._sharing_mask:
            return super().get_mask_sizes(cast(int, query_length), layer_idx)
        # Early versions 5 hand over the positions of the new tokens.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return max(cast(CacheLayerMixin, self.layers[i]).get_mask_sizes(new) for i in self._sharing_mask)

    # transformers' annotation says int, its static caches return tensors
    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        offset = super().get_query_offset(layer_idx)
        if layer_idx in self._sharing_mask and not self._uniform:
            return torch.tensor(offset).as_subclass(FittingMask)
        return offset

    @staticmethod
    def check_attention_mask(attention_mask: Tensor | None) -> None:
        """ValueError if ``attention_mask [B, N]`` has zeros: padded batches are not supported."""
        refuse_padding(attention_mask)

    # -- changes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, as assisted decoding does (the number is negative).

        Raises:
            ValueError: where it would cut into what a compression left; no layer is changed then.
        """
        if tokens_to_remove > 0 and _CROPS_TO_LENGTH:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        for layer in self._lagkv_layers().values():
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LagKVCache:
        """Move the full-attention layers, or convert what they hold; the other layers follow their own states."""
        for layer in self._lagkv_layers().values():
            layer.to(None if device is None else torch.device(device), dtype)
        return self

    def _lagkv_layers(self) -> dict[int, LagKVLayer]:
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, LagKVLayer)}
