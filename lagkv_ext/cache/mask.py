"""What the cache must know of attention masks: padding is refused, and one mask serves layers of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_padding(attention_mask: Any) -> None:
    """ValueError for a 2-D mask with zeros: padding would enter partitions, set bounds and be kept as sink."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or bool(attention_mask.all()):
        return
    padded = int((attention_mask == 0).any(dim=1).sum())
    raise ValueError(
        f"LagKVCache does not support padded batches: attention_mask has zeros in {padded} of its "
        f"{attention_mask.shape[0]} sequences. Batch sequences of equal length, or give every sequence its own cache. "
        "(generate makes such a mask by itself where a prompt contains the padding token; pass "
        "attention_mask=torch.ones_like(input_ids) if it is meant)"
    )


class FittingMask(Tensor):
    """A mask (or what it is computed from) that is cut to the keys it meets.

    transformers makes one mask for all full-attention layers. Where the layers hold different numbers of rows (ratios
    per layer, skipped layers) that mask is made for the longest. Its last columns are the new tokens and all columns
    before them are visible to everyone, so for a layer with fewer rows the right mask is its last columns: they are
    taken where mask and keys meet, in `scaled_dot_product_attention` and in the addition to eager attention weights.

    It enters as the query offset, which transformers allows to be a tensor and adds into every mask (masking_utils).
    """

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
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            args = [_cut(x, columns) for x in args]
            return func(*args, **{name: _cut(x, columns) for name, x in kwargs.items()})


def _cut(x: Any, columns: int) -> Any:
    return x.as_subclass(Tensor)[..., -columns:] if isinstance(x, FittingMask) else x
