"""Attention masks of the static cache: padding with the first prompt, and the rows that a step may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lagkv_ext.cache.masks.hook import MaskFunction
from lagkv_ext.cache.padded.padding import Padding, check_mask, check_prompt_mask
from lagkv_ext.cache.static.layer import LagKVStaticLayer
from lagkv_ext.cache.static.slots import SlotLayer

_NO_TWO_DIMENSIONS = (
    "a compiled or captured region cannot read a 2-D attention_mask: give LagKVStaticCache none there or, in a padded "
    "batch, a 4-D mask made of visible_columns, as generate does"
)


class StaticMasks:
    """Sees the 2-D attention mask of every step outside of compiled regions.

    The mask of a prompt must have been seen, or told by the caller. A compiled step (and any other of at most
    ``step_tokens`` tokens after the prompt) needs none: there the cache takes one token of every sequence at a time.
    """

    def __init__(self, layers: Sequence[Any]):
        self._layers = layers
        self.reset()

    def reset(self) -> None:
        self.padding: Padding | None = None
        self._known = 0  # columns whose mask was seen or told
        self._caller_makes_masks = False
        self._begun = False  # a step has come

    def make(self, layer: SlotLayer, new: int, function: MaskFunction, arguments: dict[str, Any]) -> Any:
        """See the mask in ``arguments`` and make the one that ``layer`` needs."""
        mask = arguments.get("attention_mask")
        if mask is not None and mask.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(_NO_TWO_DIMENSIONS)
        if self.padding is None and (mask is None or bool(mask.all())):
            if new > layer.step_tokens or not self._begun:
                self._known = self.seen + new
            return function(**arguments)
        seen = self.seen
        if not seen:
            self._begin_with(mask)
            columns, offset = layer.get_mask_sizes(new)  # of a prompt with padding
            arguments.update(kv_length=columns, kv_offset=offset, q_offset=layer.get_query_offset())
        else:
            self._check_one_token(mask, seen, new)
            if isinstance(layer, LagKVStaticLayer):
                arguments["attention_mask"] = layer.visible(new)
        self._known = seen + new
        return function(**arguments)

    def tell(self, mask: Tensor | None) -> None:
        """Take in what `LagKVStaticCache.set_attention_mask` is told; errors as there."""
        if mask is None or mask.dim() == 4:
            if self.padding is not None:
                raise ValueError("this cache holds a padded batch, so it needs 2-D masks of its steps")
            self._caller_makes_masks = True
            return
        mask, seen = check_mask(mask), self.seen
        if not seen:
            self._begin_with(mask)
        elif self.padding is not None or not bool(mask.all()):
            self._check_one_token(mask, seen, mask.shape[1] - seen)
        self._known = mask.shape[1]

    def check_traced(self, mask: Tensor | None) -> None:
        """RuntimeError for a mask whose padding would go unseen in a compiled region."""
        if mask is not None:
            raise RuntimeError(_NO_TWO_DIMENSIONS)

    def check_step(self, layer: SlotLayer, new: int) -> None:
        """ValueError unless the mask of a prompt is known."""
        if self._caller_makes_masks or (self._begun and new <= layer.step_tokens and not layer.awaits_prompt):
            return
        seen = int(layer.get_seq_length())
        if seen + new > self._known:
            raise ValueError(
                f"LagKVStaticCache has not seen the attention_mask of these {new} tokens (after {seen}), so it cannot "
                "tell whether they are padding. It sees the 2-D masks that transformers' mask functions are given, and "
                "no others. Call cache.set_attention_mask(mask) before the step, with the 2-D mask, or with None if "
                "there is no padding"
            )

    def begun(self) -> None:
        """A step has gone through all layers."""
        self._begun = True

    @property
    def seen(self) -> int:
        return int(next(x for x in self._layers if isinstance(x, LagKVStaticLayer)).get_seq_length())

    def select(self, sequences: Tensor) -> None:
        if self.padding is not None:
            self.padding.select(sequences.cpu())

    def _begin_with(self, mask: Tensor | None) -> None:
        """Take in the mask of the first prompt."""
        self.padding = None
        if mask is not None and not bool(mask.all()):
            mask = check_prompt_mask(mask)
            self.padding = Padding(mask.shape[0], 0, left_only="LagKVStaticCache does not take")
            self.padding.take(mask, 0)
        for layer in self._layers:
            if isinstance(layer, LagKVStaticLayer):
                layer.set_padding(self.padding)

    def _check_one_token(self, mask: Tensor | None, seen: int, new: int) -> None:
        """ValueError unless ``mask`` is that of one more token of every sequence after a padded prompt."""
        if mask is None:
            assert self.padding is not None
            raise ValueError(
                "LagKVStaticCache holds a padded batch, so the model needs an attention_mask "
                f"[{self.padding.batch}, {seen + new}] with every step, got none"
            )
        if self.padding is None:
            raise ValueError(
                f"LagKVStaticCache takes padding with the first prompt alone, got an attention_mask with zeros after "
                f"{seen} tokens. Use LagKVCache"
            )
        if new > 1 or not bool(mask[:, -1].all()):
            raise ValueError(
                "LagKVStaticCache takes one token of every sequence at a time after a padded prompt, got an "
                f"attention_mask for {new} with {int((mask[:, -new:] == 0).sum())} zeros. Use LagKVCache"
            )
        self.padding.take(mask, seen)
