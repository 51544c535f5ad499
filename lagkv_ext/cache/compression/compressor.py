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
        each = self.settings.lag_size - self.settings.keep
        return sum(done.count * each + done.shed for done in passes)

    def into_new(
        self, track: Track, passes: Iterable[Pass], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows ``[B, H, n, D]`` after ``passes``, in new tensors; their positions go to ``track``."""
        options = self.settings.operator_arguments
        scoring = {name: option for name, option in options.items() if name != "budget"}
        for done in passes:
            # The operator takes any strides but those of a last dimension that is not contiguous.
            key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
            scores = None
            with self._timed(key.device):
                if self.settings.carries_scores:
                    key, value, index, scores = torch.ops.lagkv.compress_carried(
                        key, value, track.carried(key), done.start, **scoring
                    )
                    if done.shed:
                        left, scores = self._shed(done, index.shape[2], scores)
                        key, value = (torch.ops.lagkv.compact(x, left) for x in (key, value))
                        index = index.gather(2, left.long())
                else:
                    key, value, index = torch.ops.lagkv.compress(key, value, done.start, **options)
            track.record(index, done, scores)
        return key, value

    def in_place(self, track: Track, done: Pass, key: Tensor, value: Tensor) -> None:
        """Move the rows that ``done`` leaves to the front of ``key, value [B, H, n, D]``; positions go to ``track``."""
        options, scores, sink = self.settings.operator_arguments, None, self.settings.sink_size
        with self._timed(key.device):
            if self.settings.carries_scores:
                carried = track.carried(key)
                rows = carried.new_empty(key.shape[:3])
                rows[:, :, sink : done.start] = carried
                options.update(scores=rows, sink_size=sink)
                scores = rows[:, :, sink : done.start + done.count * self.settings.keep]
            index = torch.ops.lagkv.compress_(key, value, done.start, **options)
            if scores is not None and done.shed:
                left, scores = self._shed(done, index.shape[2], scores)
                for x in (key, value):
                    x[:, :, : left.shape[2]] = torch.ops.lagkv.compact(x[:, :, : index.shape[2]], left)
                index = index.gather(2, left.long())
        track.record(index, done, scores)

    def _shed(self, done: Pass, rows: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows that stay of ``rows``, int32 ``[B, H, rows - done.shed]``, ascending, and the scores of the
        chosen ones among them; ``scores [B, H, C]`` are those of the rows that the operator chose."""
        chosen, sink = scores.shape[2], self.settings.sink_size
        best = torch.ops.lagkv.topk_index(scores.contiguous(), chosen - done.shed)
        row = torch.arange(rows, dtype=torch.int32, device=scores.device).expand(*scores.shape[:2], rows)
        left = torch.cat([row[:, :, :sink], best + sink, row[:, :, sink + chosen :]], dim=2)
        return left, scores.gather(2, best.long())

    def _timed(self, device: torch.device) -> contextlib.AbstractContextManager:
        timer = self.timer  # read once: whoever watched may leave at any time, in another thread
        return contextlib.nullcontext() if timer is None else timer.timing(device)
