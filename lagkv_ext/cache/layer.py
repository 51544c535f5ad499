"""One full-attention layer: a growth buffer and the recursion of LagKV."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lagkv_ext.cache.budget import Pass, Plan
from lagkv_ext.cache.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.rows import RowLayer, check_crop_number
from lagkv_ext.cache.track import Track


class LagKVLayer(RowLayer):
    """Keys and values of one layer, compressed as they grow; their lengths and positions are in its `Track`.

    Memory. A new token is written behind the last row. In decoding, a compression that comes due runs in place, at the
    beginning of the next step: until then attention may still read the rows. After a prompt or a long chunk
    attention gets the full states, only a compressed copy is kept, and the full states die when the model lets go of
    them: a prompt costs the compressed cache plus the states of one layer. The lengths are those after the
    compression as soon as it is due; only the rows come later.
    """

    @classmethod
    def of_rows(cls, key: Tensor, value: Tensor, track: Track) -> LagKVLayer:
        """A layer that holds these rows, which it reads and never writes to, and goes on from there."""
        layer = cls(track.settings)
        layer.take_rows(key, value, track)
        return layer

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        super().reset()
        self._due: tuple[Pass, ...] = ()  # compressions accounted for while their rows are still in place
        self._track = Track(self.settings)

    def take_rows(self, key: Tensor, value: Tensor, track: Track) -> None:
        """Hold these rows instead, without a copy, and go on from there."""
        LagKVLayer.lazy_initialization(self, key, value)
        self._buffer = RowBuffer(key, value)
        self._track = track

    @property
    def tracks(self) -> tuple[Track, ...]:
        """One for all sequences."""
        return (self._track,)

    @property
    def seen(self) -> int:
        return self._track.seen

    @property
    def rows(self) -> int:
        return self._track.rows

    @property
    def start(self) -> int:
        return self._track.start

    @property
    def compressions(self) -> int:
        return self._track.compressions

    # -- what transformers asks

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(rows that attention will see, position of the first if they were contiguous)``.

        The offset puts the ``query_length`` new rows at their true positions, so that they are causal among
        themselves; every older row comes out at a position before them, so that all new tokens see it.
        """
        return self.rows + query_length, self.seen - self.rows

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in new tokens ``[B, H, n, D]``; returns the keys and values that attention of this step sees.

        Raises:
            RuntimeError: states that require grad while gradients are recorded.
            ValueError: states unlike those held (batch, heads, head dim, dtype, device).
        """
        buffer = self._ready(key_states, value_states)
        new = key_states.shape[2]
        planned = Plan((), self.rows + new, self.start) if self.record_past else self._track.plan(new)
        self._track.append(new)
        total = self.rows
        if planned.passes and (total > buffer.capacity or len(planned.passes) > 1):
            return self._replace(key_states, value_states, planned)
        if total > buffer.capacity:
            buffer.reallocate(self._capacity_for(total))
        buffer.append(key_states, value_states)
        if planned.passes:
            self._due = planned.passes
            self._track.account(planned)
        return buffer.key, buffer.value

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, all of them if there are fewer; errors as in `check_crop`.

        While the past is recorded, the tokens that stay are compressed now.
        """
        self.check_crop(tokens_to_remove)
        if self._buffer is None:
            return
        self.settle()
        self._track.remove(min(-tokens_to_remove, self.rows))
        self._buffer.rows = self.rows
        if self.record_past:
            planned = self._track.plan()
            self._due = planned.passes
            self._track.account(planned)
            self.settle()
        if self._buffer.capacity > 2 * self._capacity_for(self.rows):
            self._buffer.reallocate(self._capacity_for(self.rows))

    def check_crop(self, tokens_to_remove: int) -> None:
        """ValueError for a positive number (transformers >= 5 counts negatively) and where a compression would have
        to be undone: the tokens it chose from are gone."""
        check_crop_number(tokens_to_remove)
        recent = self._track.recent
        if self.compressions and -tokens_to_remove > recent:
            raise ValueError(
                f"crop would undo a compression: asked to remove {-tokens_to_remove} tokens, but only the last "
                f"{recent} of the {self.seen} tokens seen are all still there (compressions so far: "
                f"{self.compressions}, rows held: {self.rows})"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    # -- what the cache asks beyond that

    def kept_positions(self) -> Tensor:
        """int32 ``[B, H, rows]``: position of every held row, ascending."""
        self.settle()
        if self._buffer is None:
            raise ValueError("kept_positions: this layer has seen no token yet")
        batch, heads = self._buffer.key.shape[:2]
        return self._track.positions(batch, heads, self._buffer.key.device)

    def storages(self) -> list[Tensor]:
        """The tensors that this layer keeps alive."""
        buffer, chosen = self._buffer, self._track.chosen  # read once, see uncompressed_bytes
        tensors = [] if buffer is None else buffer.storages
        return tensors if chosen is None else [*tensors, chosen]

    def settle(self) -> None:
        if not self._due:
            return
        assert self._buffer is not None
        passes, self._due = self._due, ()
        with plain_tensors():
            for done in passes:
                key, value = self._buffer.key, self._buffer.value
                with self._timed(key):
                    index = torch.ops.lagkv.compress_(
                        key, value, done.start, **self.settings.operator_arguments
                    )
                self._buffer.rows -= self._dropped(done.count)
                self._track.record(index, done)

    # -- compression

    def _replace(self, key: Tensor, value: Tensor, planned: Plan) -> tuple[Tensor, Tensor]:
        """Compress into new storage of exactly the rows that stay. The full states belong to the caller alone."""
        assert self._buffer is not None
        with plain_tensors():
            if self._buffer.rows:
                key = torch.cat([self._buffer.key, key], dim=2)
                value = torch.cat([self._buffer.value, value], dim=2)
            self._buffer = None  # the old rows are free before the new ones come
            self._track.account(planned)
            new_key, new_value = key, value
            for done in planned.passes:
                new_key, new_value, index = self._compress(new_key, new_value, done.start)
                self._track.record(index, done)
            self._buffer = RowBuffer(new_key, new_value)
            return key, value

    # -- memory

    def _most_needed(self) -> int:
        """Rows that decoding reaches before a compression, for this and the next two compressions; with a sixteenth of
        the rows as room where that is more, so that buffers are replaced ever more rarely as they grow."""
        return self.start + 2 * self.settings.lag_size + max(2 * self.settings.keep, self.start // 16)

    def _capacity_for(self, rows: int) -> int:
        if not self.settings.compresses:
            return rows + max(rows // 16, 64)
        most = self._most_needed()
        capacity = min(rows + max(rows, 64), most) if rows <= most else rows + rows // 16
        budget = self.settings.max_tokens
        return capacity if budget is None else max(rows, min(capacity, budget))

    def _map_as_is(self, change: Callable[[Tensor], Tensor]) -> None:
        assert self._buffer is not None
        self._buffer.map(change)
        with plain_tensors():
            self._track.map(change)
