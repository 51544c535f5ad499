"""End of past recording for the layers of transformers (`LagKVLayer` ends it by itself)."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin


class PastRecording:
    """Recorded steps of layers that transformers made: sliding windows and linear attention.

    `generate` switches the mode on for assisted decoding and leaves it on. Such a layer then keeps every token of the
    requests that follow. Assisted decoding calls `crop` after every step, so a step without one ends the mode.
    """

    def __init__(self) -> None:
        self._awaits_crop: set[int] = set()

    def begin_step(self, index: int, layer: Any) -> None:
        """Call before a step of layer ``index``."""
        if not getattr(layer, "record_past", False):
            return
        if index in self._awaits_crop:
            self._awaits_crop.discard(index)
            end_recording(layer)
        else:
            self._awaits_crop.add(index)

    def cropped(self) -> None:
        """`crop` was called, or the mode was switched on."""
        self._awaits_crop.clear()


def end_recording(layer: Any) -> None:
    """Shrink a layer to what it holds when it does not record."""
    layer.crop(0)
    layer.record_past = False
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        states: dict[int, Any] = layer.conv_states
        for i, x in states.items():
            missing = int(layer.conv_kernel_size[i] or 0) - x.shape[-1]
            if missing > 0:  # a recorded prompt shorter than the kernel
                states[i] = torch.nn.functional.pad(x, (missing, 0))
