"""``LagKVCache``: the cache that is handed to a transformers model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from lagkv_ext import arguments
from lagkv_ext.cache.growing.hybrid import LagKVHybridLayer
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.growing.recording import PastRecording
from lagkv_ext.cache.masks.hook import AskedLength, MaskFunction, install
from lagkv_ext.cache.masks.keeper import MaskKeeper
from lagkv_ext.cache.models import check_config, cross_attention_layers, ratios_refusal, uncompressed_layers
from lagkv_ext.cache.padded.padding import check_prompt_mask
from lagkv_ext.cache.report import ReportsLayers
from lagkv_ext.cache.settings import LayerSettings, layer_settings, settings_per_layer
from lagkv_ext.cache.storage import StoredInFiles, describe_model


class LagKVCache(ReportsLayers, StoredInFiles, DynamicCache):
    """Key-value cache for transformers models, compressed by LagKV as it grows (arXiv 2504.04704).

    Use it where a `DynamicCache` would be used: ``model.generate(..., cache=LagKVCache(model.config))``; the keyword is
    ``past_key_values`` before transformers 5.24.

    Full-attention layers are compressed recursively, in the prompt (in one piece or in chunks) and in decoding:
    whenever two full partitions have come together, every partition but the last loses all but its ``keep`` best
    tokens. Attention of a step sees the cache as it was before the compression that the step sets off (the paper's
    order). Layers of other kinds (sliding window, chunked, linear attention, shared) keep the cache that `DynamicCache`
    gives them. ``get_seq_length()`` counts the tokens seen; `report` says how many rows a layer still holds.

    Args:
        config: ``model.config`` of a decoder-only model (others: `LagKVEncoderDecoderCache`).
        lag_size: tokens per partition, at least 1.
        keep_ratio: share kept of each partition, in (0, 1]; default 0.25. Exclusive with ``keep``. With 1 nothing is
            ever dropped and generation is that of `DynamicCache`.
        keep: tokens kept of each partition, ``1 <= keep <= lag_size``.
        sink_size: leading tokens that are always kept, at least 0.
        score: "std" (the paper), "cosine" or "blend" (both together).
        value_weight: weight of the value score against the key score, finite.
        smooth: odd; the score of a token is the mean over so many neighbours in its partition.
        budget: "partition" (the paper): ``keep`` tokens of each partition. "head": the partitions of a head share what
            is kept, and rows that earlier compressions chose compete again, with the scores that they were chosen by.
        layer_keep_ratio: layers with a ``keep_ratio`` of their own, ``{layer: ratio}``; a negative index counts from
            the last layer of the model; only full-attention layers.
        skip_layers: layers that are never compressed; negative indices as above.
        max_tokens: rows that a compressed layer may hold, at least ``sink_size + 2 lag_size``; by default there is
            no bound, and a layer grows by ``keep`` rows for every ``lag_size`` tokens. A compression that leaves
            no room for the next one makes the layer start again from the sink: the next one chooses among
            all rows after it, as if they were a new sequence. With ``budget="head"`` it drops the rows with the lowest
            scores instead. Tokens given one by one never take a layer over it; many at once do for the step that
            brings them.
        boundary: compress only when the tokens seen are a multiple of it, itself a multiple of ``lag_size``. Keys and
            values of a token then depend on the tokens up to it and on the settings alone, not on the steps in which
            they came, as in the vLLM plugin. A step that reaches over a boundary at which a compression comes due is
            refused: give prompts with ``prefill_chunk_size=boundary``. Not with ``max_tokens`` or assisted decoding.
        quantization: "int8", "int4" or "fp8" for the kept rows of full-attention layers, with a scale for every
            32 channels (`quantizer`). The most recent rows, from one to two ``lag_size``, are held as they came, so the
            same tokens are kept as without it; where nothing is dropped, all rows before them are quantised.
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

    Masks. The cache sees the 2-D masks that transformers' mask functions are given (``masks/hook.py`` says how). A step
    whose mask it has not seen is refused: see `set_attention_mask`, for 4-D masks and for attention that makes its own.

    Assisted decoding and prompt lookup are a mode that `generate` switches on: a rejected token never decides what is
    kept. The mode ends with the request, at the first step that is not followed by `crop`, or at `reset`.

    Limits, each refused when met: states that require grad (run under ``torch.no_grad()``); `crop` into what a
    compression left; more than 2^31 - 1 tokens. Read `kept_positions` and `kept_hash` between forward passes, not
    inside one.
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
        smooth: int = 1,
        budget: str = "partition",
        layer_keep_ratio: Mapping[int, float] | None = None,
        skip_layers: Iterable[int] = (),
        max_tokens: int | None = None,
        quantization: str | None = None,
        boundary: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ):
        check_config(config, self._part_of_encoder_decoder)
        arguments.boolean("offloading", offloading)
        arguments.boolean("offload_only_non_sliding", offload_only_non_sliding)
        base = layer_settings(
            lag_size=lag_size,
            keep_ratio=keep_ratio,
            keep=keep,
            sink_size=sink_size,
            value_weight=value_weight,
            score=score,
            smooth=smooth,
            budget=budget,
            max_tokens=max_tokens,
            quantization=quantization,
            boundary=boundary,
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
        other_rows = cross_attention_layers(config)
        rows_of_tokens = [
            i for i, layer in enumerate(self.layers) if _is_compressed(layer) and i not in other_rows
        ]
        uncompressed = uncompressed_layers(config)
        full_layers = [i for i in rows_of_tokens if i not in uncompressed]
        if not full_layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(
                f"{type(config).__name__} has no full-attention layer that could be compressed; the caches of its "
                f"{len(self.layers)} layers are {', '.join(kinds)}"
            )
        settings = settings_per_layer(base, full_layers, len(self.layers), layer_keep_ratio, skip_layers)
        # Not plain layers of transformers: ours know padding, and can be saved.
        whole = dataclasses.replace(base, keep=base.lag_size, quantization=None)
        settings |= {i: whole for i in rows_of_tokens if i in uncompressed}
        if any(isinstance(x, LinearAttentionAndFullAttentionLayer) for x in self.layers):
            _check_hybrid(quantization, offloading)
        for i in rows_of_tokens:
            self.layers[i] = _compressed_layer(self.layers[i], settings[i])
        self._compresses = any(x.compresses for x in settings.values())
        others = [x for x in MaskKeeper(self.layers, True, other_rows).sharing if x not in settings]
        uniform = not others and len(set(settings.values())) == 1
        self._masks = MaskKeeper(self.layers, uniform, other_rows)
        self._recording = PastRecording()
        attention = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
        if not uniform and attention == "flex_attention":
            raise ValueError(
                "layers that keep different numbers of tokens (layer_keep_ratio, skip_layers) cannot share the block "
                "mask of flex_attention; use the attention implementation sdpa, eager or flash_attention_2"
            )
        if not uniform and (reason := ratios_refusal(config)) is not None:
            raise ValueError(
                f"{type(config).__name__} cannot have layers that keep different numbers of tokens (layer_keep_ratio, "
                f"skip_layers): {reason}"
            )
        install()

    # -- masks

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """``(columns, position of the first)`` of the attention mask for ``query_length`` new tokens.

        A full-attention layer answers for all of them, since they share one mask: with the longest.
        """
        if layer_idx in self._masks.sharing:
            columns, offset = self._masks.sizes(query_length)
        else:
            columns, offset = super().get_mask_sizes(query_length, layer_idx)
        if not self._compresses:
            return columns, offset
        install()
        return AskedLength.of(columns, self, layer_idx, query_length), offset

    def make_mask(self, layer: int, new: int, function: MaskFunction, given: dict[str, Any]) -> Any:
        """The mask of a step, from transformers' mask function (``masks/hook.py``).

        Raises:
            ValueError: the model's attention mask does not fit the tokens seen, or hides what cannot be hidden here.
        """
        return self._masks.make(layer, new, function, given)

    def set_attention_mask(self, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> None:
        """Tell the cache of a mask that it cannot see: a 4-D one, or one of attention code that makes its own masks.
        Steps of transformers' models with 2-D masks, `generate` included, need no call.

        Args:
            attention_mask: ``[B, tokens seen and new]``, ones for tokens and zeros for padding, before every step that
                brings padding: the caller makes the masks, until `reset`. None: likewise, and no step so far has
                padding. Or the 4-D mask ``[B or 1, heads or 1, new, columns]`` of a step without padding, before that
                step, with as many columns as `get_mask_sizes` says.
            position_ids: ``[B, new]`` of that step; needed after padding behind tokens, and only where the model does
                not hand them on (transformers before 5.24).

        Raises:
            ValueError: not zeros and ones in that shape; padding among the tokens of a sequence, or a first token after
                a prompt of nothing but padding; other values than before for tokens seen; a 4-D mask with other
                columns. Nothing is changed then.
        """
        for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if x is not None:
                arguments.tensor(name, x)
        self._masks.tell(attention_mask, position_ids)

    def visible_columns(self, layer: int, new: int) -> Tensor:
        """bool ``[B, columns]`` on the CPU: columns that `update` is about to return for ``new`` tokens and that hold
        tokens. Beyond that, the mask of a step is causal among its ``new`` last columns.

        The layers of a padded batch hold a rectangle: shorter sequences have hidden columns on the left.
        """
        return self._masks.visible(self._layer_index(layer), arguments.integer("new", new, minimum=1))

    @staticmethod
    def check_attention_mask(attention_mask: Tensor | None) -> None:
        """ValueError unless ``attention_mask [B, N]`` is one of a prompt that this cache can hold: zeros and ones,
        every sequence with a token, and no padding among its tokens."""
        if attention_mask is not None:
            check_prompt_mask(arguments.tensor("attention_mask", attention_mask))

    # -- steps

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens of one layer, ``[B, H, n, D]``; returns the rows that attention of this step sees.

        Raises:
            ValueError: the mask of these tokens was neither seen nor told (`set_attention_mask`).
        """
        layer, new, visible = self.layers[layer_idx], key_states.shape[-2], None
        if self._compresses and layer_idx not in self._masks.other_rows:
            self._masks.check_step(layer, new, kwargs.get("kwargs") or {})
            visible = self._masks.hidden_by(layer_idx, new)
        if not isinstance(layer, LagKVLayer):
            self._recording.begin_step(layer_idx, layer)
        key, value = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._masks.fit(layer_idx, key, visible)
        return key, value

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs) -> Tensor:
        layer = self.layers[layer_idx]
        if state_idx == 0 and not isinstance(layer, LagKVLayer):
            self._recording.begin_step(layer_idx, layer)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    # -- changes

    def activate_past_recording(self) -> None:
        self._recording.cropped()
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, as assisted decoding does (the number is negative).

        Raises:
            ValueError: where it would cut into what a compression left; no layer is changed then.
        """
        arguments.integer("tokens_to_remove", tokens_to_remove)
        for layer in self._lagkv_layers().values():
            layer.check_crop(tokens_to_remove)
        seen = self.get_seq_length()
        super().crop(tokens_to_remove)
        self._recording.cropped()
        self._masks.remove(seen - self.get_seq_length())

    def reset(self) -> None:
        """Forget everything and free the memory; padding and past recording end too."""
        super().reset()
        for layer in self.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False
        self._recording.cropped()
        self._masks.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        arguments.indices("beam_idx", beam_idx)
        super().reorder_cache(beam_idx)
        self._masks.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(arguments.integer("repeats", repeats, minimum=1))
        self._masks.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(arguments.indices("indices", indices))
        self._masks.select(indices)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LagKVCache:
        """Move the full-attention layers, or convert their rows; the other layers follow their own states."""
        if device is not None:
            device = arguments.device("device", device)
        arguments.storage_type("dtype", dtype)
        for layer in self._lagkv_layers().values():
            layer.to(device, dtype)
        return self

    def kept_positions(self, layer: int, sequence: int | None = None) -> Tensor:
        """int32 ``[B, H, rows]``: position of every row that a full-attention layer holds, ascending per head.

        In a padded batch positions count the tokens of each sequence from 0, and a sequence with fewer rows than the
        longest has -1 in front. With ``sequence``, ``[H, rows]`` of that one alone.
        """
        positions = super().kept_positions(layer)
        if sequence is None:
            return positions
        sequence = arguments.integer("sequence", sequence)
        if not -positions.shape[0] <= sequence < positions.shape[0]:
            raise ValueError(
                f"sequence must be an index into the batch of {positions.shape[0]}, got {sequence}"
            )
        return positions[sequence][:, positions[sequence, 0] >= 0]

    def _check_can_be_stored(self) -> None:
        if self._masks.padding is not None:
            raise ValueError(
                "a padded batch cannot be saved: read every sequence into a cache of its own, or keep a copy() of it"
            )

    def _lagkv_layers(self) -> dict[int, LagKVLayer]:
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, LagKVLayer)}


def _is_compressed(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def _compressed_layer(layer: Any, settings: LayerSettings) -> LagKVLayer:
    """The replacement of a layer that transformers made."""
    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        return LagKVHybridLayer(settings, layer.number_of_states)
    return LagKVLayer(settings)


def _check_hybrid(quantization: str | None, offloading: bool) -> None:
    if quantization is not None:
        raise ValueError(
            f"quantization={quantization!r} is not possible in models whose layers have linear and full attention in "
            "one"
        )
    if offloading:
        raise ValueError(
            "offloading=True is not possible in models whose layers have linear and full attention in one: "
            "transformers never fetches such layers back"
        )
