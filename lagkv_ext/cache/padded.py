"""One full-attention layer of a padded batch: every sequence is compressed as it would be alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lagkv_ext.cache.budget import Pass, Plan
from lagkv_ext.cache.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.layer import LagKVLayer
from lagkv_ext.cache.padding import Padding
from lagkv_ext.cache.rows import RowLayer, check_crop_number
from lagkv_ext.cache.settings import LayerSettings
from lagkv_ext.cache.track import Track


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a step brings, sequence by sequence."""

    tokens: Tensor  # bool [B, n]: which of the new columns hold tokens
    begins: list[int]  # the first of them
    counts: list[int]
    plans: list[Plan]


class PaddedLayer(RowLayer):
    """A rectangle ``[B, H, columns, D]`` of the rows of every sequence, each with a `Track` of its own.

    Rows end in the last column: a shorter sequence has hidden columns on its left, as with the left padding of a
    prompt. So new tokens are one column for all, whatever each sequence holds, and the mask of a step is "hidden
    columns, then rows that all see, then the new columns, causal among themselves". Padding given with a step is in
    the columns of that step alone, and is gone with the next. Hidden columns hold zeros, or numbers that the
    model made for the same sequence.

    ``seen`` counts columns, padding included, as transformers does; tracks count tokens.
    """

    def __init__(self, settings: LayerSettings, padding: Padding):
        self._padding = padding
        super().__init__(settings)

    @classmethod
    def following(cls, layer: LagKVLayer, padding: Padding) -> PaddedLayer:
        """Goes on where ``layer``, which had no padding, stands."""
        layer.settle()
        padded = cls(layer.settings, padding)
        padded.record_past, padded.timer = layer.record_past, layer.timer
        if layer.is_initialized:
            padded.is_initialized, padded._buffer = True, layer._buffer
            padded.dtype, padded.device = layer.dtype, layer.device
        padded._seen = layer.seen
        padded._tracks = layer._track.split(padding.tokens.shape[0])
        return padded

    def reset(self) -> None:
        super().reset()
        self._seen = 0
        self._tracks = [Track(self.settings) for _ in range(self._padding.tokens.shape[0])]
        self._due: list[tuple[Pass, ...]] = []

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def rows(self) -> int:
        """Of the sequence that has the most: the columns held."""
        return max((track.rows for track in self._tracks), default=0)

    @property
    def tracks(self) -> tuple[Track, ...]:
        """One for every sequence."""
        return tuple(self._tracks)

    @property
    def rows_per_sequence(self) -> tuple[int, ...]:
        return tuple(track.rows for track in self._tracks)

    @property
    def compressions(self) -> int:
        """Of the sequence that had the most."""
        return max((track.compressions for track in self._tracks), default=0)

    @property
    def compressions_per_sequence(self) -> tuple[int, ...]:
        return tuple(track.compressions for track in self._tracks)

    # -- what transformers asks

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As `LagKVLayer.get_mask_sizes`, of the sequence with the most rows; the others have hidden columns."""
        return self.rows + query_length, self._seen - self.rows

    def visible(self, new: int) -> Tensor:
        """bool ``[B, columns]`` on the CPU: the columns that attention of a step of ``new`` columns may see."""
        hidden = self.rows - torch.tensor(self.rows_per_sequence)
        return torch.cat([torch.arange(self.rows) >= hidden[:, None], self._step(new).tokens], dim=1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in new columns ``[B, H, n, D]``; returns what attention of this step sees, ``[B, H, columns, D]``."""
        batch = len(self._tracks)
        if key_states.dim() == 4 and key_states.shape[0] != batch:
            raise ValueError(
                f"key states must have the batch size of attention_mask ({batch}), got shape "
                f"{list(key_states.shape)}"
            )
        buffer = self._ready(key_states, value_states)
        new = key_states.shape[2]
        step = self._step(new)
        old_rows = self.rows_per_sequence
        for track, count, planned in zip(self._tracks, step.counts, step.plans, strict=True):
            track.append(count)
            track.account(planned)
        self._seen += new
        total = buffer.rows + new
        due = [planned.passes for planned in step.plans]
        many = any(due) and total > buffer.capacity and new > self._room(total)
        if many or not self._in_place(step, old_rows):
            return self._replace(key_states, value_states, step, old_rows)
        if total > buffer.capacity:
            buffer.reallocate(total + self._room(total))
        buffer.append(key_states, value_states)
        self._due = due if any(due) else []
        return buffer.key, buffer.value

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns, of every sequence the tokens that it has there."""
        self.check_crop(tokens_to_remove)
        if self._buffer is None:
            return
        self.settle()
        removed = self._tokens_in_last(-tokens_to_remove)
        rows = self.rows_per_sequence
        for track, count in zip(self._tracks, removed, strict=True):
            track.remove(count)
        self._seen -= min(-tokens_to_remove, self._seen)
        if len(set(removed)) == 1:
            self._buffer.rows -= removed[0]
        else:
            columns = self._buffer.rows
            spans = [(columns - r, columns - c) for r, c in zip(rows, removed, strict=True)]
            old = self._buffer
            parts = [
                tuple(x[b : b + 1, :, begin:end] for x in (old.key, old.value))
                for b, (begin, end) in enumerate(spans)
            ]
            self._buffer = self._right_aligned(parts, self.rows, old.key, old.value)
        if self.record_past:
            plans = [track.plan() for track in self._tracks]
            for track, planned in zip(self._tracks, plans, strict=True):
                track.account(planned)
            self._due = [planned.passes for planned in plans]
        self.settle()
        if self._buffer.capacity > 2 * (self.rows + self._room(self.rows)):
            self._buffer.reallocate(self.rows + self._room(self.rows))

    def check_crop(self, tokens_to_remove: int) -> None:
        """As `LagKVLayer.check_crop`, for every sequence."""
        check_crop_number(tokens_to_remove)
        for b, removed in enumerate(self._tokens_in_last(-tokens_to_remove)):
            track = self._tracks[b]
            if track.compressions and removed > track.recent:
                raise ValueError(
                    f"crop would undo a compression of sequence {b}: asked to remove {removed} of its tokens, but "
                    f"only the last {track.recent} of the {track.seen} tokens seen are all still there "
                    f"(compressions so far: {track.compressions}, rows held: {track.rows})"
                )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self._tracks)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self._tracks))[indices.cpu()])

    # -- what the cache asks beyond that

    def kept_positions(self) -> Tensor:
        """int32 ``[B, H, columns]``: the position of every row among the tokens of its own sequence, ascending; -1 in
        hidden columns."""
        self.settle()
        if self._buffer is None:
            raise ValueError("kept_positions: this layer has seen no token yet")
        key = self._buffer.key
        positions = torch.full(key.shape[:3], -1, dtype=torch.int32, device=key.device)
        for b, track in enumerate(self._tracks):
            positions[b, :, key.shape[2] - track.rows :] = track.positions(1, key.shape[1], key.device)[0]
        return positions

    def storages(self) -> list[Tensor]:
        """The tensors that this layer keeps alive."""
        buffer = self._buffer  # read once, see uncompressed_bytes
        tensors = [] if buffer is None else buffer.storages
        return [*tensors, *(track.chosen for track in self._tracks if track.chosen is not None)]

    def settle(self) -> None:
        """Run what is due, then forget the columns in which no sequence has a row."""
        if self._buffer is None:
            return
        due, self._due = self._due, []
        key, value = self._buffer.key, self._buffer.value
        with plain_tensors():
            for b, passes in enumerate(due):
                if passes:
                    rows = [x[b : b + 1, :, x.shape[2] - passes[0].rows :] for x in (key, value)]
                    kept_key, kept_value = self._run(b, passes, *rows)
                    rows[0][:, :, -kept_key.shape[2] :] = kept_key
                    rows[1][:, :, -kept_key.shape[2] :] = kept_value
        self._buffer.drop_first(self._buffer.rows - self.rows)

    # -- a step

    def _step(self, new: int) -> _Step:
        tokens = self._padding.columns(self._seen, new)
        counts = tokens.sum(dim=1).tolist()
        plans = []
        for track, count in zip(self._tracks, counts, strict=True):
            # A sequence that only gets padding does nothing, as it would alone.
            waits = self.record_past or count == 0
            plans.append(Plan((), track.rows + count, track.start) if waits else track.plan(count))
        begins = tokens.int().argmax(dim=1).tolist() if new else [0] * len(counts)
        return _Step(tokens, begins, counts, plans)

    def _in_place(self, step: _Step, old_rows: tuple[int, ...]) -> bool:
        """Whether new columns may be written behind the old ones and compressed there."""
        new = step.tokens.shape[1]
        for begin, count, rows in zip(step.begins, step.counts, old_rows, strict=True):
            # Rows must end in the last column, without a gap.
            if (count and begin + count < new) or (rows and count < new):
                return False
        return all(len(planned.passes) <= 1 for planned in step.plans)

    def _replace(
        self, key: Tensor, value: Tensor, step: _Step, old_rows: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Move the rows that stay into new storage of exactly as many columns as the longest sequence needs."""
        assert self._buffer is not None
        with plain_tensors():
            columns = self._buffer.rows
            if columns:
                key = torch.cat([self._buffer.key, key], dim=2)
                value = torch.cat([self._buffer.value, value], dim=2)
            self._buffer = None  # the old rows are free before the new ones come

            def stay() -> Iterable[tuple[Tensor, ...]]:
                for b, (begin, count, rows) in enumerate(
                    zip(step.begins, step.counts, old_rows, strict=True)
                ):
                    spans = [(columns - rows, columns), (columns + begin, columns + begin + count)]
                    all_rows = [_join(x[b : b + 1], spans) for x in (key, value)]
                    yield self._run(b, step.plans[b].passes, *all_rows)

            self._buffer = self._right_aligned(stay(), self.rows, key, value)
            return key, value

    def _run(
        self, sequence: int, passes: tuple[Pass, ...], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows of a sequence after the compressions ``passes``."""
        for done in passes:
            key, value, index = self._compress(key, value, done.start)
            self._tracks[sequence].record(index, done)
        return key, value

    def _right_aligned(
        self, parts: Iterable[tuple[Tensor, ...]], columns: int, key: Tensor, value: Tensor
    ) -> RowBuffer:
        """The rows of all sequences, ``[1, H, rows, D]`` each, in tensors like these of ``columns`` columns."""
        with plain_tensors():
            whole = [x.new_empty((len(self._tracks), x.shape[1], columns, x.shape[3])) for x in (key, value)]
            for b, part in enumerate(parts):
                for x, rows in zip(whole, part, strict=True):
                    x[b, :, : columns - rows.shape[2]] = 0
                    x[b, :, columns - rows.shape[2] :] = rows[0]
            return RowBuffer(*whole)

    # -- changes

    def _tokens_in_last(self, columns: int) -> list[int]:
        columns = min(columns, self._seen)
        return self._padding.columns(self._seen - columns, columns).sum(dim=1).tolist()

    def _select(self, sequences: Tensor) -> None:
        self.settle()
        chosen = sequences.tolist()
        tracks = [copy.copy(self._tracks[i]) for i in chosen]
        if self._buffer is not None:
            self._buffer.map(lambda x: x.index_select(0, sequences.to(x.device)))
        self._tracks = tracks
        self.settle()

    def _room(self, columns: int) -> int:
        """Columns of room for new tokens: replacing the buffer costs a copy, and columns freed on the left of all
        sequences come back only with that."""
        return max(self.settings.lag_size if self.settings.compresses else 64, columns // 16)

    def _map_as_is(self, change: Callable[[Tensor], Tensor]) -> None:
        assert self._buffer is not None
        self._buffer.map(change)
        with plain_tensors():
            for track in self._tracks:
                track.map(change)


def _join(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """These spans of rows, one after the other; a view where they are one."""
    (begin, end), (next_begin, next_end) = spans
    if begin == end:
        return x[:, :, next_begin:next_end]
    if next_begin == end:
        return x[:, :, begin:next_end]
    return torch.cat([x[:, :, begin:end], x[:, :, next_begin:next_end]], dim=2)
