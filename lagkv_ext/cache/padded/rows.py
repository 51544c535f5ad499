"""Rows of a padded batch: every sequence is compressed as it would be alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lagkv_ext.cache.compression.compressor import Compressor
from lagkv_ext.cache.compression.plan import Pass
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.growing.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.growing.dense import DenseRows
from lagkv_ext.cache.padded.padding import Padding
from lagkv_ext.cache.rows import Rows
from lagkv_ext.cache.settings import LayerSettings


@dataclasses.dataclass(frozen=True)
class _Step:
    """The new columns of a step, sequence by sequence."""

    width: int
    begins: list[int]  # the first column that holds a token
    counts: list[int]  # of tokens
    old_rows: list[int]  # rows held before the step

    @property
    def fits(self) -> bool:
        """Tells whether the columns may be appended as they are: rows then end in the last column, without a gap."""
        return all(
            not (count and begin + count < self.width) and not (rows and count < self.width)
            for begin, count, rows in zip(self.begins, self.counts, self.old_rows, strict=True)
        )


class PaddedRows(Rows):
    """A rectangle ``[B, H, columns, D]`` of the rows of every sequence, each with a `Track` of its own.

    Rows end in the last column: a shorter sequence has hidden columns on its left, as with the left padding of a
    prompt. So a new token is one column for all, whatever each sequence holds, and the mask of a step is "hidden
    columns, then rows that all see, then the new columns, causal among themselves". Padding given with a step is in
    the columns of that step alone, and leaves with the next. Hidden columns hold zeros, or numbers that the model made
    for the same sequence.

    ``seen`` counts columns, padding included, as transformers does; tracks count tokens.
    """

    def __init__(self, settings: LayerSettings, compressor: Compressor, padding: Padding):
        super().__init__(settings, compressor)
        self._padding = padding
        self._buffer: RowBuffer | None = None
        self._seen = 0
        self._tracks = [Track(settings) for _ in range(padding.batch)]
        self._due: list[tuple[Pass, ...]] = []
        self._before: list[Track] | None = None  # the tracks before what is due, where the step was held

    @classmethod
    def following(cls, rows: DenseRows, padding: Padding) -> PaddedRows:
        """Continues ``rows``, which had no padding, in the same memory."""
        rows.settle()
        padded = cls(rows.settings, rows.compressor, padding)
        padded._buffer, padded._seen = rows.buffer, rows.seen
        padded._tracks = rows.track.split(padding.batch)
        return padded

    @property
    def tracks(self) -> tuple[Track, ...]:
        return tuple(self._tracks)

    @property
    def seen(self) -> int:
        return self._seen

    # -- steps

    def check_step(self, new: int) -> None:
        counts = self._padding.columns(self._seen, new).sum(dim=1).tolist()
        for track, count in zip(self._tracks, counts, strict=True):
            track.check_step(count)

    def check_states(self, key: Tensor, value: Tensor) -> None:
        if key.shape[0] != self.batch:
            raise ValueError(
                f"key states must have the batch size of attention_mask ({self.batch}), got shape {list(key.shape)}"
            )
        if self._buffer is not None:
            self._buffer.check_states(key, value)

    def take(self, key: Tensor, value: Tensor, *, hold: bool) -> tuple[Tensor, Tensor]:
        self.settle()
        buffer = self._buffer = self._buffer or RowBuffer.empty(key, value)
        step = self._step(key.shape[2])
        for track, count in zip(self._tracks, step.counts, strict=True):
            track.append(count)
        self._seen += step.width
        before = [track.copy() for track in self._tracks]
        columns = max(track.rows for track in before)
        # A sequence that only gets padding does nothing, as it would alone.
        due = self._account(lambda b: step.counts[b] > 0)
        total = buffer.rows + step.width
        if not step.fits or (not hold and self._needs_new_storage(due, total, step.width)):
            nothing: list[tuple[Pass, ...]] = [()] * self.batch
            ran, columns = (nothing, columns) if hold else (due, self.rows)
            key, value = self._realign(key, value, step, ran, columns)
            due = due if hold else []
        else:
            if total > buffer.capacity:
                buffer.reallocate(total + self._room(total))
            buffer.append(key, value)
            key, value = buffer.key, buffer.value
        self._due = due if any(due) else []
        self._before = before if hold else None
        return key, value

    def settle(self) -> None:
        """Run what is due, then forget the columns in which no sequence has a row."""
        due, held = self._due, self._before is not None
        self._due, self._before = [], None
        if self._buffer is None:
            return
        key, value = self._buffer.key, self._buffer.value
        with plain_tensors():
            for b, passes in enumerate(due):
                if passes:
                    rows = [x[b : b + 1, :, x.shape[2] - passes[0].rows :] for x in (key, value)]
                    kept = self.compressor.into_new(self._tracks[b], passes, rows[0], rows[1])
                    for x, y in zip(rows, kept, strict=True):
                        x[:, :, x.shape[2] - y.shape[2] :] = y
        self._buffer.drop_first(self._buffer.rows - self.rows)
        if held and due:
            self._buffer.reallocate(self.rows + self._room(self.rows))

    def check_crop(self, count: int) -> None:
        tracks = self._before or self._tracks
        for b, (track, removed) in enumerate(zip(tracks, self._tokens_in_last(count), strict=True)):
            track.check_removal(removed, f" of sequence {b}")

    def crop(self, count: int) -> None:
        """Remove the last ``count`` columns, of every sequence the tokens that it has there."""
        self.check_crop(count)
        if self._buffer is None:
            return
        if self._before is not None:
            self._tracks, self._before, self._due = self._before, None, []
        self.settle()
        removed = self._tokens_in_last(count)
        rows, columns = [track.rows for track in self._tracks], self._buffer.rows
        for track, tokens in zip(self._tracks, removed, strict=True):
            track.remove(tokens)
        self._seen -= min(count, self._seen)
        if len(set(removed)) == 1:
            self._buffer.rows -= removed[0]
        else:
            spans = [(columns - r, columns - n) for r, n in zip(rows, removed, strict=True)]
            old = self._buffer
            parts = (
                tuple(x[b : b + 1, :, begin:end] for x in (old.key, old.value))
                for b, (begin, end) in enumerate(spans)
            )
            self._buffer = _right_aligned(parts, self.rows, old.key, old.value)
        self._due = self._account(lambda b: True)
        self.settle()
        if self._buffer.capacity > 2 * (self.rows + self._room(self.rows)):
            self._buffer.reallocate(self.rows + self._room(self.rows))

    def _step(self, width: int) -> _Step:
        tokens = self._padding.columns(self._seen, width)
        counts = tokens.sum(dim=1).tolist()
        begins = tokens.int().argmax(dim=1).tolist() if width else [0] * self.batch
        return _Step(width, begins, counts, [track.rows for track in self._tracks])

    def _account(self, takes_part: Callable[[int], bool]) -> list[tuple[Pass, ...]]:
        """Plan the compressions of the sequences that take part, and set the lengths to those after them."""
        due = []
        for b, track in enumerate(self._tracks):
            planned = track.plan() if takes_part(b) else None
            due.append(planned.passes if planned else ())
            if planned:
                track.account(planned)
        return due

    def _needs_new_storage(self, due: list[tuple[Pass, ...]], total: int, new: int) -> bool:
        """Tells whether compressions run at once, into new storage: several of a sequence, or after a prompt."""
        assert self._buffer is not None
        many = any(due) and total > self._buffer.capacity and new > self._room(total)
        return many or any(len(passes) > 1 for passes in due)

    def _realign(
        self, key: Tensor, value: Tensor, step: _Step, due: list[tuple[Pass, ...]], columns: int
    ) -> tuple[Tensor, Tensor]:
        """Move what ``due`` leaves of the rows into new storage of ``columns`` columns; returns the full states."""
        assert self._buffer is not None
        with plain_tensors():
            old = self._buffer.rows
            if old:
                key = torch.cat([self._buffer.key, key], dim=2)
                value = torch.cat([self._buffer.value, value], dim=2)
            self._buffer = None  # the old rows are free before the new ones come

            def kept() -> Iterable[tuple[Tensor, Tensor]]:
                for b, track in enumerate(self._tracks):
                    begin = old + step.begins[b]
                    spans = [(old - step.old_rows[b], old), (begin, begin + step.counts[b])]
                    own_key, own_value = (_join(x[b : b + 1], spans) for x in (key, value))
                    yield self.compressor.into_new(track, due[b], own_key, own_value)

            self._buffer = _right_aligned(kept(), columns, key, value)
            return key, value

    # -- contents

    def states(self) -> tuple[Tensor, Tensor] | None:
        self.settle()
        return None if self._buffer is None else (self._buffer.key, self._buffer.value)

    def positions(self) -> Tensor | None:
        """Position of each row among the tokens of its own sequence."""
        self.settle()
        if self._buffer is None:
            return None
        key = self._buffer.key
        positions = torch.full(key.shape[:3], -1, dtype=torch.int32, device=key.device)
        for b, track in enumerate(self._tracks):
            positions[b, :, key.shape[2] - track.rows :] = track.positions(1, key.shape[1], key.device)[0]
        return positions

    def visible(self, new: int) -> Tensor:
        rows = torch.tensor([track.rows for track in self._tracks], device="cpu")
        old = torch.arange(self.rows, device="cpu") >= self.rows - rows[:, None]
        return torch.cat([old, self._padding.columns(self._seen, new)], dim=1)

    @property
    def batch(self) -> int:
        return len(self._tracks)

    @property
    def bytes_per_token(self) -> int:
        buffer = self._buffer  # read once: a monitor asks from another thread while steps replace it
        return 0 if buffer is None else buffer.bytes_per_row

    def tensors(self) -> list[Tensor]:
        buffer, tracks = self._buffer, self._tracks  # read once, as above
        held = [x for track in tracks for x in track.tensors()]
        return held if buffer is None else [*buffer.storages, *held]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._buffer is None:
            return
        self._buffer.map(change)
        with plain_tensors():
            for track in [*self._tracks, *(self._before or ())]:
                track.map(change)

    def select(self, sequences: Tensor) -> None:
        self.settle()
        if self._buffer is not None:
            self._buffer.map(lambda x: x.index_select(0, sequences.to(x.device)))
        self._tracks = [self._tracks[i].copy() for i in sequences.tolist()]
        self.settle()

    def _tokens_in_last(self, columns: int) -> list[int]:
        columns = min(columns, self._seen)
        return self._padding.columns(self._seen - columns, columns).sum(dim=1).tolist()

    def _room(self, columns: int) -> int:
        """Columns of room for new tokens: replacing the buffer costs a copy, and columns freed on the left of all
        sequences come back only with that."""
        return max(self.settings.lag_size if self.settings.compresses else 64, columns // 16)


def _right_aligned(
    parts: Iterable[tuple[Tensor, ...]], columns: int, key: Tensor, value: Tensor
) -> RowBuffer:
    """The rows of all sequences, ``[1, H, rows, D]`` each, in tensors like these of ``columns`` columns."""
    with plain_tensors():
        whole = [x.new_empty((*x.shape[:2], columns, x.shape[3])) for x in (key, value)]
        for b, part in enumerate(parts):
            for x, rows in zip(whole, part, strict=True):
                x[b, :, : columns - rows.shape[2]] = 0
                x[b, :, columns - rows.shape[2] :] = rows[0]
        return RowBuffer(*whole)


def _join(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """These spans of rows, one after the other; a view where they are one."""
    (begin, end), (next_begin, next_end) = spans
    if begin == end:
        return x[:, :, next_begin:next_end]
    if next_begin == end:
        return x[:, :, begin:next_end]
    return torch.cat([x[:, :, begin:end], x[:, :, next_begin:next_end]], dim=2)
