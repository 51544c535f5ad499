"""One mask for layers that hold different numbers of rows."""

from __future__ import annotations

import torch
from torch import Tensor


class SharedMask:
    """The mask of a step, cut to every layer in its turn.

    transformers makes one mask for all full-attention layers, and hands the same tensor to each. Where the layers hold
    different numbers of rows (ratios per layer, skipped layers), it is made for the longest. Its last columns are the
    new tokens and all columns before them are visible to every token, so for a layer with fewer rows the right mask
    is its last columns; in a padded batch every layer also hides columns of its own.

    There is no extension point between two layers that would see the mask in every attention implementation: eager
    attention is a function of each model's own file. But the cache is called in every layer, between the moment when
    the layer gets the mask and its attention: `fit` then gives the tensor, ``handed_out``, the shape and content for
    that layer, in place (`Tensor.set_`). Before the first `fit` it has no columns, so a model that computes something
    from the mask outside of its layers, a copy of it on another device included, meets a tensor that fits no keys and
    fails; it never attends with the mask of another layer.
    """

    def __init__(self, mask: Tensor):
        self._mask = mask
        self.handed_out = mask.new_empty((*mask.shape[:3], 0))

    def fit(self, key: Tensor, visible: Tensor | None) -> None:
        """Cut the mask to ``key [B, H, columns, D]``; ``visible``, bool ``[B, columns]``, hides columns of old rows.

        Raises ValueError: keys on another device than the mask.
        """
        mask, columns = self._mask, key.shape[2]
        if key.device != mask.device:
            raise ValueError(
                f"layers that hold different numbers of rows share one attention_mask, which is on {mask.device}, and "
                f"this layer is on {key.device}: keep the model on one device, or leave out layer_keep_ratio and "
                "skip_layers"
            )
        new = mask.shape[2]
        cut = mask[..., mask.shape[3] - columns :]
        if visible is not None and columns > new:
            cut = cut.clone()
            old = visible[:, None, None, : columns - new].to(mask.device)
            if mask.dtype == torch.bool:
                cut[..., : columns - new] = old
            else:
                zero = torch.zeros((), dtype=mask.dtype, device=mask.device)
                cut[..., : columns - new] = torch.where(old, zero, torch.finfo(mask.dtype).min)
        self.handed_out.set_(cut.untyped_storage(), cut.storage_offset(), cut.shape, cut.stride())
