"""Attention masks of a growing cache: which it has seen, and the ones that its layers need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.masks.hook import MaskFunction, with_padding
from lagkv_ext.cache.masks.shared import SharedMask
from lagkv_ext.cache.padded.padding import Padding, check_mask

_SHARING_ATTENTION = ("sdpa", "eager")


class MaskKeeper:
    """Sees the 2-D attention mask of every step, finds padding in it, and makes the masks of full-attention layers.

    Full-attention layers share one mask, made for the longest of them. ``layers`` are all those of the cache;
    ``other_rows`` are those whose rows are not the tokens, and which have masks of their own.
    """

    def __init__(self, layers: Sequence[Any], uniform: bool, other_rows: Collection[int] = ()):
        self._layers = layers
        self.other_rows = other_rows
        self._uniform = uniform  # whether all of them are compressed alike
        self.sharing = tuple(
            i
            for i, layer in enumerate(layers)
            if isinstance(layer, CacheLayerMixin)
            and not getattr(layer, "is_sliding", False)
            and i not in other_rows
        )
        self.reset()

    def reset(self) -> None:
        self.padding: Padding | None = None
        self._known = 0  # columns whose mask was seen or told
        self._caller_makes_masks = False
        self._positions: Tensor | None = None  # told with the mask of the next step
        self._positions_checked = 0  # columns
        self._shared: list[SharedMask] = []  # of one step

    # -- seen by the mask function

    def make(self, layer: int, new: int, function: MaskFunction, arguments: dict[str, Any]) -> Any:
        """See the mask in ``arguments`` and make the one that ``layer`` needs, as the layers that share it."""
        attention = str(getattr(arguments.get("config"), "_attn_implementation", None))
        if self._known != self.seen + new:
            self._shared.clear()
        self._see(arguments.get("attention_mask"), new, attention)
        if layer not in self.sharing:
            return function(**arguments)
        if self.padding is not None:
            arguments = with_padding(arguments, self.visible(self._longest(new), new))
        if self._alike(new):
            return function(**arguments)
        if self.padding is not None:
            arguments["allow_is_causal_skip"] = False  # every layer hides columns of its own
        mask = function(**arguments)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(_one_mask(attention))
        # A model makes one for each kind of layer that it knows, of which it may have none: then this one is not used.
        self._shared.append(SharedMask(mask))
        return self._shared[-1].handed_out

    def sizes(self, new: int) -> tuple[int, int]:
        """``(columns, position of the first)`` of the mask that full-attention layers share."""
        return self._layers[self._longest(new)].get_mask_sizes(new)

    def _longest(self, new: int) -> int:
        return max(self.sharing, key=lambda i: self._layers[i].get_mask_sizes(new))

    def _alike(self, new: int) -> bool:
        """Tells whether all layers that share a mask need the same one now."""
        if self._uniform:
            return True
        if self.padding is None:
            return len({self._layers[i].get_mask_sizes(new)[0] for i in self.sharing}) == 1
        masks = [self.visible(i, new) for i in self.sharing]
        return all(torch.equal(mask, masks[0]) for mask in masks)

    def _see(self, mask: Tensor | None, new: int, attention: str) -> None:
        seen = self.seen
        if mask is None:
            if self.padding is not None:
                raise ValueError(
                    "this cache holds a padded batch, so the model needs an attention_mask "
                    f"[{self.padding.batch}, {seen + new}] with every step, got none"
                )
        elif self.padding is not None or not bool(mask.all()):
            if not self._uniform and attention not in _SHARING_ATTENTION:
                raise ValueError(_one_mask(attention))
            if mask.dim() == 2 and mask.shape[1] != seen + new:
                raise ValueError(
                    f"attention_mask must have a column for each of the {seen} tokens seen and the {new} new ones, "
                    f"got shape {list(mask.shape)}"
                )
            self._take(mask)
        for layer in self._layers:
            if isinstance(layer, LagKVLayer):
                layer.check_step(new)
        if self._known != seen + new:
            self._positions = None  # those told with an earlier step
        self._known = seen + new

    # -- told by the caller

    def tell(self, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Take in what `LagKVCache.set_attention_mask` is told; errors as there."""
        self._shared.clear()
        if mask is None:
            if self.padding is not None:
                raise ValueError("this cache holds a padded batch, so its attention_mask cannot be None")
            self._caller_makes_masks = True
            return
        if mask.dim() == 4:
            self._check_four_dimensions(mask)
            self._known = self.seen + mask.shape[2]
            return
        mask = check_mask(mask)
        if self.padding is not None or not bool(mask.all()):
            self._take(mask)
        self._known, self._positions = mask.shape[1], position_ids
        self._caller_makes_masks = True

    def _check_four_dimensions(self, mask: Tensor) -> None:
        new = mask.shape[2]
        for i in self.sharing:
            columns = self._layers[i].get_mask_sizes(new)[0]
            if mask.shape[3] != columns:
                raise ValueError(
                    f"a 4-D attention_mask must have a column for each of the {columns - new} rows that layer {i} "
                    f"holds and the {new} new tokens (get_mask_sizes({new}, {i})), got shape {list(mask.shape)}"
                )

    def _take(self, mask: Tensor) -> None:
        """Take in a mask; with the first one that has padding, every sequence gets lengths of its own."""
        if self.padding is not None:
            self.padding.take(mask, self.seen)
            return
        self._check_can_be_padded()
        others = sorted({type(x).__name__ for x in self._layers} - {LagKVLayer.__name__, "DummyLayer"})
        reason = f"a layer of this model cannot tell from a token ({', '.join(others)})" if others else None
        padding = Padding(mask.shape[0], self.seen, left_only=reason)
        padding.take(mask, self.seen)
        self.padding = padding
        for layer in self._layers:
            if isinstance(layer, LagKVLayer):
                layer.pad(padding)

    def _check_can_be_padded(self) -> None:
        ours = [layer for layer in self._layers if isinstance(layer, LagKVLayer)]
        if any(layer.settings.quantization is not None for layer in ours):
            what = "with quantization"
        elif any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in ours):
            what = "in models whose layers have linear and full attention in one"
        else:
            return
        raise ValueError(
            f"padded batches are not served {what}: batch sequences of equal length, or give every sequence its own "
            "cache"
        )

    # -- in a step

    def check_step(self, layer: Any, new: int, attention_arguments: Mapping[str, Any]) -> None:
        """ValueError unless the mask of the next ``new`` tokens of ``layer`` is known, and their positions where they
        matter."""
        seen = layer.get_seq_length()
        if seen + new > self._known and not self._caller_makes_masks:
            raise ValueError(
                f"LagKVCache has not seen the attention_mask of these {new} tokens (after {seen}), so it cannot tell "
                "whether they are padding. It sees the 2-D masks that transformers' mask functions are given, and no "
                "others. Before a step with a 4-D attention_mask call cache.set_attention_mask(that mask); it needs as "
                f"many columns as cache.get_mask_sizes says, here {self.sizes(new)[0]}. Where attention makes its own "
                "masks, call cache.set_attention_mask(mask) with the 2-D mask before every step, or once with None if "
                "there is no padding"
            )
        if self.padding is not None and self._positions_checked < seen + new:
            told = self._positions if self._positions is not None else attention_arguments.get("position_ids")
            self.padding.check_positions(told, seen, new)
            self._positions_checked = seen + new

    def visible(self, layer: int, new: int) -> Tensor:
        """bool ``[B, columns]`` on the CPU: columns of ``layer`` that hold tokens, ``new`` to come included."""
        held = self._layers[layer]
        if isinstance(held, LagKVLayer):
            return held.visible(new)
        columns = held.get_mask_sizes(new)[0]
        if self.padding is None:
            batch = held.keys.shape[0] if held.is_initialized else 1
            return torch.ones(batch, columns, dtype=torch.bool, device="cpu")
        return self.padding.columns(held.get_seq_length() + new - columns, columns)

    def hidden_by(self, layer: int, new: int) -> Tensor | None:
        """`visible` where `fit` will need it; ask before the step."""
        if not self._shared or self.padding is None or layer not in self.sharing:
            return None
        return self.visible(layer, new)

    def fit(self, layer: int, key: Tensor, visible: Tensor | None) -> None:
        """Cut the shared masks, if any, to the keys ``[B, H, columns, D]`` that attention of ``layer`` gets."""
        if layer not in self.sharing:
            return
        for mask in self._shared:
            mask.fit(key, visible)
        if layer == self.sharing[-1]:
            self._shared.clear()  # attention of this layer has them, and nobody needs them after that

    @property
    def seen(self) -> int:
        return next(x for x in self._layers if isinstance(x, CacheLayerMixin)).get_seq_length()

    # -- changes

    def remove(self, columns: int) -> None:
        if self.padding is not None:
            self.padding.remove(columns)
        self._known = min(self._known, self.seen)
        self._positions_checked = min(self._positions_checked, self.seen)

    def select(self, sequences: Tensor) -> None:
        if self.padding is not None:
            self.padding.select(sequences.cpu())

    def repeat(self, repeats: int) -> None:
        if self.padding is not None:
            self.select(torch.arange(self.padding.batch, device="cpu").repeat_interleave(repeats))


def _one_mask(attention: str) -> str:
    return (
        "layers that keep different numbers of tokens (layer_keep_ratio, skip_layers) hide different columns of a "
        f"padded batch, which the one mask of {attention} cannot say; use the attention implementation sdpa or eager"
    )
