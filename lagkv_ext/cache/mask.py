"""What the cache must know of attention masks: padding is found and rewritten, one mask serves different layers."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


class MaskRequest:
    """The 2-D attention mask of the model, in the frame of the function that asks the cache for mask sizes.

    transformers never shows a cache the attention mask, and a padded batch would go wrong without a word. So look at
    the mask of the function that builds masks (``_preprocess_mask_arguments`` in masking_utils), which is what asks for
    sizes. It works on a copy of its own (of type bool), which it slices and turns into the mask of whatever attention
    implementation is used: where rows are no longer the tokens seen, `hide` writes into that copy which rows are there.
    """

    def __init__(self, frame: types.FrameType):
        mask = frame.f_locals.get("attention_mask")
        self.mask: Tensor | None = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._frame = frame

    @property
    def attention(self) -> str | None:
        """The attention implementation of the model."""
        return getattr(self._frame.f_locals.get("config"), "_attn_implementation", None)

    @property
    def position_ids(self) -> Tensor | None:
        return self._frame.f_locals.get("position_ids")

    def check_private(self) -> None:
        """ValueError unless the mask is a copy that may be written to."""
        caller = self._frame.f_back
        while caller is not None and "attention_mask" not in caller.f_locals:
            caller = caller.f_back  # of the wrappers that early versions have
        if self._frame.f_code.co_name != "_preprocess_mask_arguments" or caller is None:
            raise ValueError(
                "LagKVCache serves padded batches only where transformers' masking_utils make the masks, and "
                f"{self._frame.f_code.co_name} is none of its functions"
            )
        if caller.f_locals.get("attention_mask") is self.mask:
            raise ValueError(
                "a padded batch needs an attention_mask of integers, as tokenizers make it, got torch.bool: pass "
                "attention_mask.long()"
            )

    def hide(self, visible: Tensor) -> None:
        """Write ``visible``, bool ``[B, columns]``, into the last columns of the mask."""
        assert self.mask is not None
        self.mask[:, self.mask.shape[1] - visible.shape[1] :] = visible.to(self.mask.device)


class Attending:
    """What the layer that attends now sees: bool ``[B, columns]``, or None without padding."""

    visible: Tensor | None = None


class FittingMask(Tensor):
    """A mask (or what it is computed from) that is cut to the keys it meets.

    transformers makes one mask for all full-attention layers. Where the layers hold different numbers of rows (ratios
    per layer, skipped layers) that mask is made for the longest. Its last columns are the new tokens and all columns
    before them are visible to everyone, so for a layer with fewer rows the right mask is its last columns: they are
    taken where mask and keys meet, in `scaled_dot_product_attention` and in the addition to eager attention weights.
    In a padded batch every layer also hides other columns: those of ``attending``.

    It enters as the query offset, which transformers allows to be a tensor and adds into every mask (masking_utils).
    """

    attending: Attending

    @classmethod
    def of(cls, x: Tensor, attending: Attending) -> FittingMask:
        mask = x.as_subclass(cls)
        mask.attending = attending
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        columns = None
        if func.__name__ == "scaled_dot_product_attention":
            columns = (args[1] if len(args) > 1 else kwargs["key"]).shape[-2]
        elif func.__name__ in ("add", "__add__", "__radd__", "add_"):
            weights = [x for x in args if isinstance(x, Tensor) and not isinstance(x, cls)]
            if weights and weights[0].dim() == 4:
                columns = weights[0].shape[-1]
        if columns is None:
            result = super().__torch_function__(func, types, args, kwargs)
            if isinstance(result, cls) and not hasattr(result, "attending"):
                sources = [x for x in (*args, *kwargs.values()) if isinstance(x, cls)]
                result.attending = sources[0].attending
            return result
        with torch._C.DisableTorchFunctionSubclass():
            args = [_cut(x, columns) for x in args]
            return func(*args, **{name: _cut(x, columns) for name, x in kwargs.items()})


def _cut(x: Any, columns: int) -> Any:
    if not isinstance(x, FittingMask):
        return x
    visible = x.attending.visible
    mask = x.as_subclass(Tensor)[..., -columns:]
    old = columns - mask.shape[-2]
    if visible is None or old == 0:
        return mask
    mask, visible = mask.clone(), visible[:, None, None, :old].to(mask.device)
    if mask.dtype == torch.bool:
        mask[..., :old] = visible
    else:
        nothing = torch.zeros((), dtype=mask.dtype, device=mask.device)
        mask[..., :old] = torch.where(visible, nothing, torch.finfo(mask.dtype).min)
    return mask
