"""``LagKVCache``: the cache that is handed to a transformers model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
)

from lagkv_ext.cache.layer import LagKVLayer
from lagkv_ext.cache.mask import Attending, FittingMask, MaskRequest
from lagkv_ext.cache.padded import PaddedLayer
from lagkv_ext.cache.padding import Padding, check_mask, check_prompt_mask
from lagkv_ext.cache.quantized import QuantizedLagKVLayer
from lagkv_ext.cache.report import ReportsLayers
from lagkv_ext.cache.settings import LayerSettings, check_config, layer_settings, settings_per_layer
from lagkv_ext.cache.storage import StoredInFiles, describe_model

# Before transformers 5.16: crop also took the length to crop to, and masks knew nothing of a query offset.
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
_HAS_QUERY_OFFSET = hasattr(Cache, "get_query_offset")
# By name: early versions 5 do not have it.
_HYBRID_LAYER = "LinearAttentionAndFullAttentionLayer"


class LagKVCache(ReportsLayers, StoredInFiles, DynamicCache):
    """Key-value cache for transformers models, compressed by LagKV as it grows (arXiv 2504.04704).

    Use it where a `DynamicCache` would be used: ``model.generate(..., past_key_values=LagKVCache(model.config))``.
    Full-attention layers are compressed recursively, in the prompt (in one piece or in chunks) and in decoding:
    whenever two full partitions have come together, every partition but the last loses all but its ``keep`` best
    tokens. Attention of a step sees the cache as it was before the compression that the step sets off (the paper's
    order). Layers of other kinds (sliding window, chunked, linear attention, shared) keep the cache that `DynamicCache`
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
        layer_keep_ratio: layers with a ``keep_ratio`` of their own, ``{layer: ratio}``; a negative index counts from
            the last layer of the model; only full-attention layers.
        skip_layers: layers that are never compressed; negative indices as above.
        max_tokens: rows that a compressed layer may hold, at least ``sink_size + 2 lag_size``; by default there is
            no bound, and a layer grows by ``keep`` rows for every ``lag_size`` tokens. A compression that leaves
            no room for the next one makes the layer start again from the sink: the next one chooses among
            all rows after it, as if they were a new sequence. Tokens given one by one never take a layer over it;
            many at once do for the step that brings them.
        quantization: "int8", "int4" or "fp8" for the rows of full-attention layers that stay, with a scale for every
            32 channels (`quantizer`). The most recent rows, from one to two ``lag_size``, are held as they came, so the
            same tokens stay as without it; where nothing is dropped, all rows before them are quantised.
        offloading, offload_only_non_sliding: as for `DynamicCache`: layers wait in the memory of the CPU while the
            device computes another one. Needs a device beside the CPU.

    Raises:
        TypeError, ValueError: when made: a wrong argument, a config that is no transformers configuration, or a
            model that it does not serve: no full-attention layer, encoder-decoder, multi-head latent attention,
            attention biases that count rows (ALiBi).

    Padded batches. The cache finds the padding in the attention mask that the model is given, and every sequence
    keeps the tokens that it would keep alone. From then on the model needs its attention mask in every step (`generate`
    gives it). Where all layers have full attention, padding may come on either side of the tokens of a step; after
    padding on the right the model needs ``position_ids`` that count tokens alone, which `generate` does not make.
    Code that makes its own masks uses `set_attention_mask` and `visible_columns`. Under ``torch.compile`` of the
    whole model the cache sees no mask: give it no padding there.

    Limits, each refused when met: states that require grad (run under ``torch.no_grad()``); `crop` into what a
    compression left. A custom 4-D attention mask must have as many columns as `get_mask_sizes` says. Read
    `kept_positions` and `kept_hash` between forward passes, not inside one.
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
        layer_keep_ratio: Mapping[int, float] | None = None,
        skip_layers: Iterable[int] = (),
        max_tokens: int | None = None,
        quantization: str | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ):
        check_config(config, self._part_of_encoder_decoder)
        base = layer_settings(
            lag_size=lag_size,
            keep_ratio=keep_ratio,
            keep=keep,
            sink_size=sink_size,
            value_weight=value_weight,
            score=score,
            max_tokens=max_tokens,
            quantization=quantization,
        )
        if offloading and not torch.accelerator.is_available():
            raise ValueError(
                "offloading=True keeps layers in the memory of the CPU while a device computes, and there is no device "
                "here (torch.accelerator.is_available() is False): leave it out"
            )
        super().__init__(
            config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding
        )
        self._model = describe_model(config)
        kinds_compressed = (DynamicLayer.__name__, _HYBRID_LAYER)
        full_layers = [i for i, layer in enumerate(self.layers) if type(layer).__name__ in kinds_compressed]
        if not full_layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(
                f"{type(config).__name__} has no full-attention layer that could be compressed; the caches of its "
                f"{len(self.layers)} layers are {', '.join(kinds)}"
            )
        settings = settings_per_layer(base, full_layers, len(self.layers), layer_keep_ratio, skip_layers)
        self._hybrid = any(type(layer).__name__ == _HYBRID_LAYER for layer in self.layers)
        if self._hybrid and quantization is not None:
            raise ValueError(
                f"quantization={quantization!r} is not possible in models whose layers have linear and full attention "
                "in one"
            )
        if self._hybrid and offloading:
            raise ValueError(
                "offloading=True is not possible in models whose layers have linear and full attention in one: "
                "transformers never fetches such layers back"
            )
        for i in full_layers:
            self.layers[i] = _compressed_layer(self.layers[i], settings[i])
        self._padding: Padding | None = None
        self._attending = Attending()
        self._compresses = any(x.compresses for x in settings.values())
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

        Raises:
            ValueError: the model's attention mask does not fit the tokens seen, or hides what cannot be hidden here.
        """
        # Early versions 5 hand over the positions of the new tokens.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        request = None
        if torch.compiler.is_compiling():
            if self._padding is not None:
                raise ValueError("a padded batch cannot run in a compiled model: compile without this cache")
        elif self._compresses:
            frame = sys._getframe(1)
            while frame.f_code.co_name == "get_mask_sizes" and frame.f_back is not None:
                frame = frame.f_back  # of a cache that has this one as a part
            request = MaskRequest(frame)
            self._take_mask(request, new)
        if layer_idx not in self._sharing_mask:
            return super().get_mask_sizes(cast(int, query_length), layer_idx)
        sizes = {i: cast(CacheLayerMixin, self.layers[i]).get_mask_sizes(new) for i in self._sharing_mask}
        if request is not None and self._padding is not None:
            longest = max(sizes, key=lambda i: sizes[i])
            visible = self.visible_columns(longest, new)
            if not self._uniform:
                # Every layer hides its own columns later. Hidden here, so that no mask is left out as needless.
                visible[:, : visible.shape[1] - new] = False
            request.hide(visible)
        return max(sizes.values())

    # transformers' annotation says int, its static caches return tensors
    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        offset = super().get_query_offset(layer_idx)
        if layer_idx in self._sharing_mask and not self._uniform:
            return FittingMask.of(torch.tensor(offset), self._attending)
        return offset

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Take in the new tokens of one layer, ``[B, H, n, D]``; returns what attention of this step sees."""
        if self._padding is not None and not self._uniform and layer_idx in self._sharing_mask:
            self._attending.visible = self.visible_columns(layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _take_mask(self, request: MaskRequest, new: int) -> None:
        if request.mask is None:
            if self._padding is not None:
                raise ValueError(
                    "this cache holds a padded batch, so the model needs an attention_mask "
                    f"[{self._padding.tokens.shape[0]}, {self.get_seq_length() + new}] with every step, got none"
                )
            return
        if self._padding is None and bool(request.mask.all()):
            return
        request.check_private()
        if not self._uniform and request.attention not in ("sdpa", "eager"):
            raise ValueError(
                "layers that keep different numbers of tokens (layer_keep_ratio, skip_layers) hide different columns "
                f"of a padded batch, which the one mask of {request.attention} cannot say; use the attention "
                "implementation sdpa or eager"
            )
        columns = self.get_seq_length() + new
        if request.mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask must have a column for each of the {columns - new} tokens seen and the {new} new "
                f"ones, got shape {list(request.mask.shape)}"
            )
        self._pad(request.mask)
        if self._padding is not None:
            self._padding.check_positions(request.position_ids, columns - new)

    def _pad(self, attention_mask: Tensor) -> None:
        """Take in a mask; with the first one that has padding, every sequence gets lengths of its own."""
        if self._padding is not None:
            self._padding.take(attention_mask, self.get_seq_length())
            return
        if any(layer.settings.quantization is not None for layer in self._lagkv_layers().values()):
            raise ValueError(
                "padded batches are not served with quantization: batch sequences of equal length, or give every "
                "sequence its own cache"
            )
        if self._hybrid:
            raise ValueError(
                "padded batches are not served in models whose layers have linear and full attention in one: batch "
                "sequences of equal length, or give every sequence its own cache"
            )
        others = sorted({type(x).__name__ for x in self.layers} - {"LagKVLayer", "DummyLayer"})
        reason = f"a layer of this model cannot tell from a token ({', '.join(others)})" if others else None
        padding = Padding(attention_mask.shape[0], self.get_seq_length(), left_only=reason)
        padding.take(attention_mask, self.get_seq_length())
        self._padding = padding
        for i, layer in self._lagkv_layers().items():
            if isinstance(layer, LagKVLayer):
                self.layers[i] = PaddedLayer.following(layer, padding)

    def set_attention_mask(self, attention_mask: Tensor) -> None:
        """Tell the cache of padding where it cannot see the model's mask: attention code that makes its own masks.

        Call it before the step that brings the padding, with ``attention_mask [B, tokens seen and new]``, ones for
        tokens and zeros for padding. Models of transformers, `generate` included, need no call.

        Raises:
            ValueError: not zeros and ones in that shape; padding among the tokens of a sequence, or nothing but padding
                for one; other values than before for tokens seen. Nothing is changed then.
        """
        mask = check_mask(attention_mask) if self.get_seq_length() else check_prompt_mask(attention_mask)
        if self._padding is not None or not bool(mask.all()):
            self._pad(mask)

    def visible_columns(self, layer: int, new: int) -> Tensor:
        """bool ``[B, columns]`` on the CPU: which of the columns that `update` is about to return for ``new`` tokens
        hold tokens. Beyond that, the mask of a step is causal among its ``new`` last columns.

        The layers of a padded batch hold a rectangle: shorter sequences have hidden columns on the left.
        """
        held = self.layers[layer]
        if isinstance(held, PaddedLayer):
            return held.visible(new)
        columns = held.get_mask_sizes(new)[0]
        if self._padding is None:
            batch = held.keys.shape[0] if held.is_initialized else 1
            return torch.ones(batch, columns, dtype=torch.bool)
        return self._padding.columns(held.get_seq_length() + new - columns, columns)

    @staticmethod
    def check_attention_mask(attention_mask: Tensor | None) -> None:
        """ValueError unless ``attention_mask [B, N]`` is one of a prompt that this cache can hold: zeros and ones,
        every sequence with a token, and no padding among its tokens."""
        if attention_mask is not None:
            check_prompt_mask(attention_mask)

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
        seen = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self._padding is not None:
            self._padding.remove(seen - self.get_seq_length())

    def reset(self) -> None:
        """Forget everything and give the memory back; padding too."""
        if self._padding is not None:
            self._padding = self._attending.visible = None
            for i, layer in self._lagkv_layers().items():
                self.layers[i] = LagKVLayer(layer.settings)
                self.layers[i].record_past = layer.record_past
                self.layers[i].timer = layer.timer
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_padding(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._padding is not None:
            batch = self._padding.tokens.shape[0]
            self._select_padding(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_padding(indices)

    def _select_padding(self, indices: Tensor) -> None:
        if self._padding is not None:
            self._padding.select(indices.cpu())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LagKVCache:
        """Move the full-attention layers, or convert what they hold; the other layers follow their own states."""
        for layer in self._lagkv_layers().values():
            layer.to(None if device is None else torch.device(device), dtype)
        return self

    def kept_positions(self, layer: int, sequence: int | None = None) -> Tensor:
        """int32 ``[B, H, rows]``: position of every row that a full-attention layer holds, ascending per head.

        In a padded batch positions count the tokens of each sequence from 0, and a sequence with fewer rows than the
        longest has -1 in front. With ``sequence``, ``[H, rows]`` of that one alone.
        """
        positions = super().kept_positions(layer)
        if sequence is None:
            return positions
        if not -positions.shape[0] <= sequence < positions.shape[0]:
            raise ValueError(
                f"sequence must be an index into the batch of {positions.shape[0]}, got {sequence}"
            )
        return positions[sequence][:, positions[sequence, 0] >= 0]

    def _check_can_be_stored(self) -> None:
        if self._padding is not None:
            raise ValueError(
                "a padded batch cannot be saved: read every sequence into a cache of its own, or keep a copy() of it"
            )

    def _lagkv_layers(self) -> dict[int, LagKVLayer | PaddedLayer]:
        return {
            i: layer for i, layer in enumerate(self.layers) if isinstance(layer, (LagKVLayer, PaddedLayer))
        }


def _compressed_layer(layer: Any, settings: LayerSettings) -> LagKVLayer:
    """What takes the place of a layer that transformers made."""
    if type(layer).__name__ == _HYBRID_LAYER:
        from lagkv_ext.cache.hybrid import LagKVHybridLayer

        return LagKVHybridLayer(settings, layer.number_of_states)
    return LagKVLayer(settings) if settings.quantization is None else QuantizedLagKVLayer(settings)
