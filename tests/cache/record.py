"""The life of one layer by the reference: what its compressions leave, one operation at a time."""

from __future__ import annotations

import torch

from lagkv_ext import reference


def states(new, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, new, dim, generator=generator) for dim in (8, 6))


class Record:
    """The rows of one layer and the positions of all of them, by the reference, one operation at a time."""

    def __init__(self, settings):
        self.settings, self.start = settings, settings.sink_size
        self.rows = (*states(0, 0), torch.zeros(2, 2, 0, dtype=torch.int32))
        self.scores = torch.zeros(2, 2, 0)  # of the chosen rows, with budget="head"
        self.seen = self.restarts = 0

    @property
    def length(self):
        return self.rows[0].shape[2]

    def append(self, key, value):
        new = key.shape[2]
        positions = torch.arange(self.seen, self.seen + new, dtype=torch.int32).expand(2, 2, new)
        self.rows = tuple(torch.cat(x, dim=2) for x in zip(self.rows, (key, value, positions), strict=True))
        self.seen += new
        arrived, settings = self.rows, self.settings
        while self.length >= self.start + 2 * settings.lag_size:
            count = (self.length - self.start) // settings.lag_size - 1
            index = self._compress()
            self.rows = (
                *(reference.compact(x, index) for x in self.rows[:2]),
                self.rows[2].gather(2, index.long()),
            )
            self.start += count * settings.keep
            if settings.budget == "head":
                self._shed()
                break
            if settings.max_tokens is None:
                break
            if self.start + 2 * settings.lag_size > settings.max_tokens:
                self.start = settings.sink_size
                self.restarts += 1
            if self.length < settings.max_tokens:
                break
        return arrived

    def crop(self, removed):
        self.rows = tuple(x[:, :, : self.length - removed] for x in self.rows)
        self.seen -= removed

    def _compress(self):
        settings, sizes = self.settings, (self.start, self.settings.lag_size, self.settings.keep)
        scoring = {name: getattr(settings, name) for name in ("score", "value_weight", "smooth")}
        if settings.budget == "partition":
            return reference.compress(*self.rows[:2], *sizes, **scoring)[2]
        *_, index, self.scores = reference.compress_carried(*self.rows[:2], self.scores, *sizes, **scoring)
        return index

    def _shed(self):
        """Drop the lowest scores, in multiples of ``keep``, until the next compression has room."""
        settings = self.settings
        while settings.max_tokens is not None and self.start + 2 * settings.lag_size > settings.max_tokens:
            self.start -= settings.keep
        chosen, left = self.scores.shape[2], self.start - settings.sink_size
        if left < chosen:
            best = reference.topk_index(self.scores, left).long()
            self.scores = self.scores.gather(2, best)
            row = torch.arange(self.length).expand(2, 2, self.length)
            sink = settings.sink_size
            index = torch.cat([row[:, :, :sink], best + sink, row[:, :, sink + chosen :]], dim=2)
            kept = (reference.compact(x, index) for x in self.rows[:2])
            self.rows = *kept, self.rows[2].gather(2, index)
