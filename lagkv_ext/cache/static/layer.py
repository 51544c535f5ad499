"""One full-attention layer at fixed addresses, compressed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext import arguments, formulas
from lagkv_ext.cache.compression.compressor import Compressor
from lagkv_ext.cache.compression.plan import starts_again
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.growing.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.growing.dense import DenseRows
from lagkv_ext.cache.padded.padding import Padding
from lagkv_ext.cache.padded.rows import PaddedRows
from lagkv_ext.cache.rows import Rows
from lagkv_ext.cache.settings import LayerSettings
from lagkv_ext.cache.static.slots import SlotLayer


class LagKVStaticLayer(SlotLayer):
    """Holds the rows that a ``LagKVLayer`` of the same settings holds, bit for bit.

    Here the lengths are tensors, so that one step, compiled or captured, stays right while the layer fills, compresses
    and starts again from the sink. A prompt is taken in by `DenseRows`, whose kept rows are copied to the slots:
    attention of that step sees the rows that it would see in a growing cache, in memory that lasts for that step.

    Every sequence has lengths of its own. Where a prompt had ``padding`` they differ: it is taken in by `PaddedRows`,
    and after it comes one token at a time, of every sequence, with a mask that shows `visible`.
    """

    is_sliding = False
    padding: Padding | None = None

    def __init__(self, settings: LayerSettings, capacity: int, step_tokens: int):
        super().__init__(capacity, step_tokens)
        assert settings.max_tokens == capacity - step_tokens + 1
        self.settings = settings
        self.max_tokens = settings.max_tokens
        self._compressor = Compressor(settings)

    @property
    def timer(self) -> CompressionTimer | None:
        """Times prompts; compressions of steps are part of captured regions."""
        return self._compressor.timer

    @timer.setter
    def timer(self, timer: CompressionTimer | None) -> None:
        self._compressor.timer = timer

    def allocate_lengths(self) -> None:
        self.positions = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.int32)
        self.start = self.keys.new_full((self.batch_size,), self.settings.sink_size, dtype=torch.int32)
        self.length = torch.zeros_like(self.start)
        self.scores = None  # of the chosen rows, where they are carried
        if self.settings.carries_scores:
            self.scores = self.keys.new_zeros(
                self.keys.shape[:3], dtype=formulas.arithmetic_dtype(self.keys.dtype)
            )
        # Tokens seen, without padding; compressions that have run; times that a layer started again from the sink.
        self.tokens, self.settled, self.restarts = (torch.zeros_like(self.start) for _ in range(3))
        # True once a step came since the last compression: each has its compression once.
        self.due = self.keys.new_zeros((), dtype=torch.bool)

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        by_sequence = [self.positions, self.start, self.length, self.tokens, self.settled, self.restarts]
        return by_sequence if self.scores is None else [*by_sequence, self.scores], [self.due]

    def reset(self) -> None:
        super().reset()
        self.set_padding(None)
        if self.is_initialized:
            self.start.fill_(self.settings.sink_size)

    def set_padding(self, padding: Padding | None) -> None:
        """First position of the prompt that comes next."""
        self.padding = padding
        self.awaits_prompt = padding is not None

    # -- masks

    def get_query_offset(self) -> int | Tensor:
        """Rows that the new tokens come after: columns of the mask are rows. After padding, behind all columns."""
        if not self.is_initialized or self.awaits_prompt:
            return 0
        return self._rows_left()[0] if self.padding is None else self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:  # type: ignore[override]
        """``(columns, 0)``: columns of the mask are rows."""
        if self.awaits_prompt:
            return query_length, 0
        if query_length > self.step_tokens:
            return int(self.get_query_offset()) + query_length, 0
        return self.capacity, 0

    def visible(self, new: int) -> Tensor:
        """bool ``[B, capacity]``: the slots that attention of a step of ``new`` tokens may see, the last ``new`` of
        each sequence causally."""
        return torch.arange(self.capacity, device=self.device) < (self._rows_left() + new)[:, None]

    # -- what the cache asks; these read lengths on the host

    @property
    def rows(self) -> int:
        """Rows held, by the sequence that has the most, once the compression that is due has run."""
        return int(self._rows_left().max()) if self.is_initialized else 0

    @property
    def compressions(self) -> int:
        """Compressions so far, of the sequence that had the most, with the one that is due."""
        if not self.is_initialized:
            return 0
        return int((self.settled + (self.due & (self._dropped(self.length) > 0))).max())

    def kept_positions(self) -> Tensor:
        """int32 ``[B, H, rows]``: position of every held row among the tokens of its sequence, ascending; of a sequence
        with fewer rows than another, -1 in front."""
        rows = self.rows
        if not rows:
            raise ValueError("kept_positions: this layer has seen no token yet")
        if int(self.seen) > arguments.MAX_LENGTH:
            raise ValueError(
                f"kept_positions: positions are int32, and this layer has seen {int(self.seen)} tokens: reset() it"
            )
        self.settle()
        if self.padding is None:
            return self.positions[:, :, :rows].clone()
        positions = torch.full_like(self.positions[:, :, :rows], -1)
        for b, held in enumerate(self.length.tolist()):
            positions[b, :, rows - held :] = self.positions[b, :, :held]
        return positions

    def uncompressed_bytes(self) -> int:
        """Bytes of the keys and values of every token seen."""
        if not self.is_initialized:
            return 0
        return int(self.seen) * RowBuffer(self.keys, self.values).bytes_per_row

    # -- steps

    def step(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.settle()
        arrived = torch.arange(key.shape[2], device=self.device)
        sequence = torch.arange(self.batch_size, device=self.device)[:, None, None]
        head = torch.arange(key.shape[1], device=self.device)[:, None]
        at = sequence, head, (self.length[:, None] + arrived)[:, None]
        # Not scatter_, for which the compiler would copy the slots.
        self.keys.index_put_(at, key)
        self.values.index_put_(at, value)
        positions = (self.tokens[:, None] + arrived).to(torch.int32)[:, None]
        self.positions.index_put_(at, positions.expand(key.shape[:3]))
        for count in (self.length, self.tokens, self.seen):
            count.add_(key.shape[2])
        self.due.fill_(True)
        return self.keys, self.values

    def settle(self) -> None:
        """Run the compression that the last step left due; only once attention of that step has run.

        This is ``compression/plan.py`` on the device. A step of up to ``step_tokens`` tokens sets off one pass at most.
        """
        rows = self.length.clone()
        if self.scores is None:
            start = self._compress(self.due, self.settings.keep)
            again = starts_again(start, self.settings.lag_size, self.max_tokens) & self.due
            self.restarts.add_(again)
            self.start.copy_(torch.where(again, self.settings.sink_size, self.start))
        else:  # a full layer keeps as many rows as before
            full = self._full()
            self._compress(self.due & ~full, self.settings.keep)
            self._compress(self.due & full, 0)
        self.settled.add_(self.length != rows)
        self.due.zero_()

    def _compress(self, takes_part: Tensor, keep: int) -> Tensor:
        """Compress the sequences that take part; returns their new ``start``."""
        # Behind the last row there are no partitions: with start there, the operator changes nothing.
        start = torch.where(takes_part, self.start, self.length)
        options = {**self.settings.operator_arguments, "keep": keep}
        if self.scores is not None:
            options.update(scores=self.scores, sink_size=self.settings.sink_size)
        index = torch.ops.lagkv.compress_ragged_(self.keys, self.values, start, self.length, **options)
        self.positions.copy_(self.positions.gather(2, index.clamp(min=0).long()))
        self.start.copy_(torch.where(takes_part, start, self.start))
        return start

    def take_in(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        growing = self._as_growing()
        new = key.shape[2]
        key, value = growing.take(key, value, hold=False)
        states, positions, tracks = growing.states(), growing.positions(), growing.tracks
        assert states is not None
        assert positions is not None
        with plain_tensors():
            for b in range(self.batch_size):
                track = tracks[b % len(tracks)]  # one by sequence, or one for all
                for slots, kept in (
                    (self.keys, states[0]),
                    (self.values, states[1]),
                    (self.positions, positions),
                ):
                    slots[b, :, : track.rows].copy_(kept[b, :, kept.shape[2] - track.rows :])
                if self.scores is not None and track.scores is not None:
                    carried = track.scores[b if len(tracks) == 1 else 0]
                    self.scores[b, :, self.settings.sink_size : track.start].copy_(carried)
                self.length[b], self.start[b] = track.rows, track.start
                self.tokens[b], self.settled[b] = track.seen, track.compressions
            self.seen.add_(new)
            self.due.zero_()
        self.awaits_prompt = False
        return key, value

    def _as_growing(self) -> Rows:
        """The rows held, as rows that grow. They read the slots and never write to them: they have no room there."""
        self.check_may_read()
        if self.awaits_prompt:
            assert self.padding is not None
            return PaddedRows(self.settings, self._compressor, self.padding)
        rows = self.rows
        if not rows:
            return DenseRows(self.settings, self._compressor)
        track = Track.of_rows(
            self.settings,
            self.kept_positions(),
            self.scores,
            start=int(self.start[0]),
            seen=int(self.seen),
            compressions=self.compressions,
        )
        return DenseRows.of_rows(self._compressor, self.keys[:, :, :rows], self.values[:, :, :rows], track)

    # -- lengths

    def _dropped(self, rows: Tensor) -> Tensor:
        """Rows that a compression of so many rows drops, by sequence."""
        count = ((rows - self.start) // self.settings.lag_size - 1).clamp(min=0)
        kept = self.settings.keep if self.scores is None else self.settings.keep * ~self._full()
        return count * (self.settings.lag_size - kept)

    def _full(self) -> Tensor:
        """bool by sequence: with carried scores, whether no more rows can be chosen."""
        most = self.settings.most_chosen
        assert most is not None
        return (self.start - self.settings.sink_size).eq(most)

    def _rows_left(self) -> Tensor:
        """Rows by sequence, once the compression that is due has run."""
        return self.length - self.due * self._dropped(self.length)
