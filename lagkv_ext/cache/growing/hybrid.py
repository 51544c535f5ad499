"""A layer with full attention and linear attention in one (Falcon-H1): its rows are compressed, its state is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.settings import LayerSettings


class LagKVHybridLayer(LinearAttentionLayer, LagKVLayer):  # type: ignore[misc] # device, dtype: None until known
    """`LagKVLayer` for keys and values beside the convolution and recurrent states of `LinearAttentionLayer`."""

    is_compileable = False
    supports_early_init = False

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return super().is_croppable and self.settings.boundary is None

    def __init__(self, settings: LayerSettings, number_of_states: int = 1):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        LagKVLayer.__init__(self, settings)

    def lazy_initialization(self, *args, **kwargs) -> None:
        """With keys and values, positional, or with the states of the linear part, by name."""
        (LagKVLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        return LagKVLayer.get_max_length(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        LagKVLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
        LagKVLayer.crop(self, tokens_to_remove)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        LagKVLayer.activate_past_recording(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_states(lambda x: x.index_select(0, beam_idx.to(x.device)))
        LagKVLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda x: x.repeat_interleave(repeats, dim=0))
        LagKVLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_states(lambda x: x[indices.to(x.device)])
        LagKVLayer.batch_select_indices(self, indices)

    def tokens_at_once(self, most: int) -> int:
        return 1

    def offload(self) -> None:
        LagKVLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LagKVLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Recurrent states keep their dtype, which is the model's choice and not that of keys and values."""
        self._map_states(lambda x: x.to(device))
        LagKVLayer.to(self, device, dtype)

    def storages(self) -> list[Tensor]:
        return [*LagKVLayer.storages(self), *self._states()]

    def uncompressed_bytes(self) -> int:
        return LagKVLayer.uncompressed_bytes(self) + sum(x.nbytes for x in self._states())

    def _states(self) -> list[Tensor]:
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return [x for x in states if x is not None]

    def _map_states(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for i, x in states.items():
                if x is not None:
                    states[i] = change(x)
