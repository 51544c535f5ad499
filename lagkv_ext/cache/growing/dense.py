"""Rows of sequences that are compressed together, in buffers that grow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lagkv_ext.cache.compression.compressor import Compressor
from lagkv_ext.cache.compression.plan import Pass, Plan
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.growing.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.rows import Rows
from lagkv_ext.cache.settings import LayerSettings


class DenseRows(Rows):
    """A `RowBuffer` and its `Track`.

    A new token is written behind the last row. In decoding, a compression that comes due runs in place, at the
    beginning of the next step: until then attention may still read the rows. After a prompt or a long chunk attention
    gets the full states, only a compressed copy is kept, and the full states are freed when the model releases them: a
    prompt costs the compressed cache plus the states of one layer.
    """

    def __init__(self, settings: LayerSettings, compressor: Compressor):
        super().__init__(settings, compressor)
        self.buffer: RowBuffer | None = None
        self.track = Track(settings)
        self._due: tuple[Pass, ...] = ()  # compressions accounted for while their rows are still in place
        self._before: Track | None = None  # the track before them, where the step was held

    @classmethod
    def of_rows(cls, compressor: Compressor, key: Tensor, value: Tensor, track: Track) -> DenseRows:
        """These rows, which are read and never written to, and their track."""
        rows = cls(track.settings, compressor)
        rows.buffer, rows.track = RowBuffer(key, value), track
        return rows

    @property
    def tracks(self) -> tuple[Track, ...]:
        return (self.track,)

    @property
    def seen(self) -> int:
        return self.track.seen

    # -- steps

    def check_step(self, new: int) -> None:
        self.track.check_step(new)

    def check_states(self, key: Tensor, value: Tensor) -> None:
        if self.buffer is not None:
            self.buffer.check_states(key, value)

    def take(self, key: Tensor, value: Tensor, *, hold: bool) -> tuple[Tensor, Tensor]:
        self.settle()
        buffer = self.buffer = self.buffer or RowBuffer.empty(key, value)
        self.track.append(key.shape[2])
        total, planned = self.track.rows, self.track.plan()
        if planned.passes and not hold and (total > buffer.capacity or len(planned.passes) > 1):
            return self._replace(key, value, planned)
        if total > buffer.capacity:
            buffer.reallocate(self._capacity_for(total))
        buffer.append(key, value)
        if planned.passes:
            self._due, self._before = planned.passes, self.track.copy() if hold else None
            self.track.account(planned)
        return buffer.key, buffer.value

    def settle(self) -> None:
        passes, held = self._due, self._before is not None
        self._due, self._before = (), None
        if not passes:
            return
        assert self.buffer is not None
        with plain_tensors():
            for done in passes:
                self.compressor.in_place(self.track, done, self.buffer.key, self.buffer.value)
                self.buffer.rows -= self.compressor.dropped((done,))
            if held:
                self._shrink()

    def check_crop(self, count: int) -> None:
        (self._before or self.track).check_removal(count)

    def crop(self, count: int) -> None:
        self.check_crop(count)
        if self.buffer is None:
            return
        if self._before is not None:
            self.track, self._before, self._due = self._before, None, ()
        self.settle()
        self.track.remove(min(count, self.track.rows))
        self.buffer.rows = self.track.rows
        planned = self.track.plan()
        self._due = planned.passes
        self.track.account(planned)
        self.settle()
        self._shrink()

    def _replace(self, key: Tensor, value: Tensor, planned: Plan) -> tuple[Tensor, Tensor]:
        """Compress into new storage of exactly the kept rows. The full states belong to the caller alone."""
        assert self.buffer is not None
        with plain_tensors():
            if self.buffer.rows:
                key = torch.cat([self.buffer.key, key], dim=2)
                value = torch.cat([self.buffer.value, value], dim=2)
            self.buffer = None  # the old rows are free before the new ones come
            self.track.account(planned)
            self.buffer = RowBuffer(*self.compressor.into_new(self.track, planned.passes, key, value))
            return key, value

    # -- contents

    def states(self) -> tuple[Tensor, Tensor] | None:
        self.settle()
        return None if self.buffer is None else (self.buffer.key, self.buffer.value)

    def positions(self) -> Tensor | None:
        self.settle()
        if self.buffer is None:
            return None
        batch, heads = self.buffer.key.shape[:2]
        return self.track.positions(batch, heads, self.buffer.key.device)

    def visible(self, new: int) -> Tensor:
        return torch.ones(self.batch or 1, self.track.rows + new, dtype=torch.bool, device="cpu")

    @property
    def batch(self) -> int:
        return 0 if self.buffer is None else self.buffer.key.shape[0]

    @property
    def bytes_per_token(self) -> int:
        buffer = self.buffer  # read once: a monitor asks from another thread while steps replace it
        return 0 if buffer is None else buffer.bytes_per_row

    def tensors(self) -> list[Tensor]:
        buffer = self.buffer  # read once, as above
        return [*([] if buffer is None else buffer.storages), *self.track.tensors()]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.buffer is None:
            return
        self.buffer.map(change)
        with plain_tensors():
            self.track.map(change)
            if self._before is not None:
                self._before.map(change)

    def select(self, sequences: Tensor) -> None:
        self.settle()
        self.map(lambda x: x.index_select(0, sequences.to(x.device)))

    # -- memory

    def _shrink(self) -> None:
        assert self.buffer is not None
        if self.buffer.capacity > 2 * self._capacity_for(self.track.rows):
            self.buffer.reallocate(self._capacity_for(self.track.rows))

    def _most_needed(self) -> int:
        """Rows that decoding reaches before a compression, for this and the next two compressions; with a sixteenth of
        the rows as room where that is more, so that buffers are replaced ever more rarely as they grow."""
        return (
            self.track.start
            + 2 * self.settings.lag_size
            + max(2 * self.settings.keep, self.track.start // 16)
        )

    def _capacity_for(self, rows: int) -> int:
        if not self.settings.compresses:
            return rows + max(rows // 16, 64)
        most = self._most_needed()
        capacity = min(rows + max(rows, 64), most) if rows <= most else rows + rows // 16
        budget = self.settings.max_tokens
        return capacity if budget is None else max(rows, min(capacity, budget))
