"""``LagKVStaticCache``: LagKV in memory of a fixed size at fixed addresses, for compiled and captured decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.configuration_utils import get_head_shapes

from lagkv_ext import arguments
from lagkv_ext.cache.growing.buffer import plain_tensors
from lagkv_ext.cache.masks.hook import AskedLength, MaskFunction, asked_while_tracing, install
from lagkv_ext.cache.models import check_config, static_refusal
from lagkv_ext.cache.report import ReportsLayers
from lagkv_ext.cache.settings import layer_settings, with_capacity
from lagkv_ext.cache.static.layer import LagKVStaticLayer
from lagkv_ext.cache.static.masks import StaticMasks
from lagkv_ext.cache.static.slots import SlotLayer
from lagkv_ext.cache.static.window import StaticWindowLayer

ATTENTION = ("eager", "sdpa")
# The length that transformers' own layers are made for. Only sliding-window layers use it, and their window caps it.
_UNBOUNDED = 2**31 - 1
# Left unchanged: a window has a size of its own, recurrent states have one size, and shared layers hold nothing.
_OTHER_LAYERS = ("StaticSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")


class LagKVStaticCache(ReportsLayers, Cache):
    """Key-value cache of a fixed capacity, compressed by LagKV in place, for ``torch.compile`` and CUDA graphs.

    Use it where a `StaticCache` would be used: ``model.generate(..., cache=LagKVStaticCache(model.config,
    capacity=4096))``, or with a decode step that is compiled or captured once and run as often as wanted. It holds
    and generates what ``LagKVCache(model.config, max_tokens=capacity, ...)`` does: a layer that is full starts again
    from the sink, so any number of tokens fits. Lengths live on the device; a step neither reads them nor
    allocates memory that stays.

    Steps of up to ``step_tokens`` tokens run at fixed addresses. More tokens at once, as in a prompt, must come
    outside of compiled and captured regions: their attention sees all that is held and all of themselves, even where
    they are more than ``capacity``, in memory of one layer at a time, and the rows that stay are copied to their
    addresses.

    Args:
        config: ``model.config`` of a decoder-only model with attention implementation eager or sdpa.
        capacity: rows for which full-attention layers have memory, at least
            ``sink_size + 2 * lag_size + step_tokens - 1``.
        max_batch_size: number of sequences, with beams of all beams. Given, memory is allocated now, otherwise at the
            first step, for as many as it has.
        dtype, device: of the memory allocated now; default: the dtype of ``config`` (else torch's default), and
            torch's default device.
        step_tokens: most tokens of a step at fixed addresses, at most ``lag_size - keep``. Room for such a step is kept
            free: what is held is what ``LagKVCache`` holds with ``max_tokens=capacity - step_tokens + 1``.
        lag_size, keep_ratio, keep, sink_size, score, value_weight, smooth, budget: as for ``LagKVCache``; ``keep`` must
            be below ``lag_size``, and all full-attention layers are treated alike.

    Raises:
        TypeError, ValueError: when made: a wrong argument, a model it does not serve (see ``LagKVCache``), or an
            attention implementation or a kind of layer that cannot go with fixed addresses and hidden rows.

    Padded batches: padding on the left of the first prompt, then one token of every sequence at a time. A compiled or
    captured region cannot read a 2-D attention mask, and refuses it: give it none or, in a padded batch, a 4-D mask
    (`generate` does, others make it of `visible_columns`). A prompt whose mask the cache has not seen is refused
    (`set_attention_mask`).

    Limits, each refused when met: another number of sequences than at first; more than ``step_tokens`` tokens in a
    compiled region; `crop`, hence assisted decoding. Read `report`, `kept_positions` and `kept_hash` between forward
    passes, not inside one. Layers with a sliding window have memory for their window alone.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        capacity: int,
        max_batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        step_tokens: int = 1,
        lag_size: int = 128,
        keep_ratio: float | None = None,
        keep: int | None = None,
        sink_size: int = 16,
        score: str = "std",
        value_weight: float = 1.0,
        smooth: int = 1,
        budget: str = "partition",
    ):
        check_config(config)
        arguments.storage_type("dtype", dtype)
        if device is not None:
            device = arguments.device("device", device)
        settings = layer_settings(
            lag_size=lag_size,
            keep_ratio=keep_ratio,
            keep=keep,
            sink_size=sink_size,
            value_weight=value_weight,
            score=score,
            smooth=smooth,
            budget=budget,
        )
        settings = with_capacity(settings, capacity, step_tokens)
        self._text_config = config.get_text_config(decoder=True)
        self._check_attention()
        layers = StaticCache(config, max_cache_len=_UNBOUNDED).layers
        _check_layers(config, layers)
        super().__init__(
            layers=[
                LagKVStaticLayer(settings, capacity, step_tokens)
                if type(x) is StaticLayer
                else StaticWindowLayer(x.max_cache_len, step_tokens)
                if type(x) is StaticSlidingWindowLayer
                else x
                for x in layers
            ]
        )
        self._masks = StaticMasks(self.layers)
        self._last = [layer for layer in self.layers if isinstance(layer, SlotLayer)][-1]
        install()
        if max_batch_size is not None:
            self._allocate(arguments.integer("max_batch_size", max_batch_size, minimum=1), dtype, device)
        elif dtype is not None or device is not None:
            raise ValueError(
                "dtype and device are those of memory allocated at once, which needs max_batch_size (without it they "
                f"are those of the first step), got dtype={dtype} and device={device}"
            )

    # -- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        """Tokens seen, which is what positions count: on the device, for all layers alike."""
        return next(iter(self._lagkv_layers().values())).get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no number of tokens is too many."""
        return -1

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        return self._attention_layer(layer_idx).get_query_offset()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int | Tensor]:  # type: ignore[override]
        self._check_attention()
        columns, offset = self._attention_layer(layer_idx).get_mask_sizes(query_length)
        if torch.compiler.is_compiling():
            if self._masks.padding is not None:
                raise RuntimeError(
                    "LagKVStaticCache holds a padded batch, whose mask a compiled region cannot make: give it a 4-D "
                    "mask, as generate does, made of visible_columns"
                )
            asked_while_tracing(self)
            return columns, offset
        install()
        return AskedLength.of(columns, self, layer_idx, query_length), offset

    def visible_columns(self, layer: int, new: int = 1) -> Tensor:
        """bool ``[B, capacity]``, on the device: the rows of a full-attention layer that attention of a step of ``new``
        tokens may see, the last ``new`` of each sequence causally. Ask before the step; compiled regions may."""
        held = self.layers[self._layer_index(layer)]
        arguments.integer("new", new, minimum=1)
        if not isinstance(held, LagKVStaticLayer) or not held.is_initialized:
            raise ValueError(
                f"layer must be one of the full-attention layers {list(self._lagkv_layers())}, with memory, got {layer}"
            )
        return held.visible(new)

    def make_mask(self, layer: int, new: int, function: MaskFunction, given: dict[str, Any]) -> Any:
        """The mask of a step, from transformers' mask function (``masks/hook.py``); ValueError for one that does not
        fit."""
        return self._masks.make(self._attention_layer(layer), new, function, given)

    def check_traced_mask(self, attention_mask: Tensor | None) -> None:
        """RuntimeError for a mask whose padding would go unseen in a compiled region."""
        self._masks.check_traced(attention_mask)

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        """Tell the cache of the mask of a prompt that it cannot see: a 4-D one, or one of attention code that makes its
        own masks. Steps of transformers' models with 2-D masks, `generate` included, need no call.

        Args:
            attention_mask: ``[B, tokens]``, before the step that it is for. None or a 4-D mask, once: no step until
                `reset` has padding, and the caller makes the masks.

        Raises:
            ValueError: a mask that does not fit, as in a step of a model.
        """
        self._masks.tell(
            None if attention_mask is None else arguments.tensor("attention_mask", attention_mask)
        )

    # -- steps

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens of one layer, ``[B, H, n, D]``; returns the rows that attention of this step sees.

        Raises:
            ValueError: a prompt whose mask was neither seen nor told (`set_attention_mask`).
        """
        layer = self.layers[layer_idx]
        if torch.compiler.is_compiling():
            asked_while_tracing(None)
        elif isinstance(layer, SlotLayer):
            self._masks.check_step(layer, key_states.shape[-2])
            if layer is self._last:
                self._masks.begun()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    # -- changes

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._masks.reset()
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        arguments.indices("beam_idx", beam_idx)
        super().reorder_cache(beam_idx)
        self._masks.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Does nothing for ``crop(0)``; refuses to remove tokens."""
        if arguments.integer("tokens_to_remove", tokens_to_remove):
            raise ValueError(
                f"LagKVStaticCache cannot remove tokens, got crop({tokens_to_remove}): what they set off in its memory "
                "is not undone. Assisted decoding needs LagKVCache"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError(_fixed_batch("batch_repeat_interleave"))

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError(_fixed_batch("batch_select_indices"))

    # -- inside

    def _attention_layer(self, layer_idx: int) -> SlotLayer:
        """That layer; for one that holds no keys and values, as transformers asks by default, the first that does."""
        layer = self.layers[layer_idx]
        return (
            layer
            if isinstance(layer, SlotLayer)
            else next(x for x in self.layers if isinstance(x, SlotLayer))
        )

    def _lagkv_layers(self) -> dict[int, LagKVStaticLayer]:
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, LagKVStaticLayer)}

    def _check_attention(self) -> None:
        attention = getattr(self._text_config, "_attn_implementation", None)
        if attention not in (None, *ATTENTION):
            raise ValueError(
                f"LagKVStaticCache needs the attention implementation {' or '.join(ATTENTION)}, got {attention}: rows "
                "behind those held are hidden by a mask over all rows, which other implementations do not take"
            )

    def _allocate(
        self, batch_size: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        heads, head_dim = get_head_shapes(self._text_config)
        dtype = dtype or getattr(self._text_config, "dtype", None) or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else torch.device(device)
        with plain_tensors():
            self.early_initialization(batch_size, heads, head_dim, dtype, device)


def _check_layers(config: PreTrainedConfig, layers: list[Any]) -> None:
    reason = static_refusal(config)
    if reason is not None:
        raise ValueError(f"{type(config).__name__} cannot go with LagKVStaticCache: {reason}. Use LagKVCache")
    kinds = {type(x).__name__ for x in layers}
    names = ", ".join(sorted(kinds))
    unfit = sorted(kinds - {StaticLayer.__name__, *_OTHER_LAYERS})
    if unfit:
        raise ValueError(
            f"{type(config).__name__} has layers that would need room for every token: {', '.join(unfit)} (among the "
            f"static caches of its {len(layers)} layers: {names})"
        )
    if StaticLayer.__name__ not in kinds:
        raise ValueError(
            f"{type(config).__name__} has no full-attention layer that could be compressed; the static caches of its "
            f"{len(layers)} layers are {names}"
        )


def _fixed_batch(method: str) -> str:
    return (
        f"LagKVStaticCache cannot change its number of sequences, which {method} would: make it with the "
        "max_batch_size that is needed in the end, or use LagKVCache"
    )
