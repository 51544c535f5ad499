"""Calls of the operators that compress, timed while somebody watches the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lagkv_ext.cache.compression.plan import Pass
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.settings import LayerSettings


class Compressor:
    """Compresses rows by the settings of one layer."""

    def __init__(self, settings: LayerSettings):
        self.settings = settings
        self.timer: CompressionTimer | None = None  #: belongs to whoever watches the cache

    def dropped(self, passes: Iterable[Pass]) -> int:
        """Rows that these compressions drop."""
        return sum(done.count for done in passes) * (self.settings.lag_size - self.settings.keep)

    def into_new(
        self, track: Track, passes: Iterable[Pass], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows ``[B, H, n, D]`` after ``passes``, in new tensors; their positions go to ``track``."""
        for done in passes:
            # The operator takes any strides but those of a last dimension that is not contiguous.
            key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
            with self._timed(key.device):
                key, value, index = torch.ops.lagkv.compress(
                    key, value, done.start, **self.settings.operator_arguments
                )
            track.record(index, done)
        return key, value

    def in_place(self, track: Track, done: Pass, key: Tensor, value: Tensor) -> None:
        """Move the rows that ``done`` leaves to the front of ``key, value [B, H, n, D]``; positions go to ``track``."""
        with self._timed(key.device):
            index = torch.ops.lagkv.compress_(key, value, done.start, **self.settings.operator_arguments)
        track.record(index, done)

    def _timed(self, device: torch.device) -> contextlib.AbstractContextManager:
        timer = self.timer  # read once: whoever watched may leave at any time, in another thread
        return contextlib.nullcontext() if timer is None else timer.timing(device)
