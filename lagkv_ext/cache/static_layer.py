"""One full-attention layer at fixed addresses, compressed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext.cache.budget import starts_again
from lagkv_ext.cache.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.layer import LagKVLayer
from lagkv_ext.cache.settings import LayerSettings
from lagkv_ext.cache.slots import SlotLayer
from lagkv_ext.cache.track import Track


class LagKVStaticLayer(SlotLayer):
    """It holds what a ``LagKVLayer`` of the same settings holds, bit for bit.

    The difference is who knows the lengths: here they are tensors, so that one step, compiled or captured, stays right
    while the layer fills, compresses and starts again from the sink. A prompt is taken in by a ``LagKVLayer``, of which
    the rows that stay are copied to the slots: attention of that step sees what it would see there, in memory that
    lasts for that step.
    """

    is_sliding = False

    def __init__(self, settings: LayerSettings, capacity: int, step_tokens: int):
        super().__init__(capacity, step_tokens)
        assert settings.max_tokens == capacity - step_tokens + 1
        self.settings = settings
        self.max_tokens = settings.max_tokens

    def allocate_lengths(self) -> None:
        self.positions = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.int32)
        self.start = self.keys.new_full((self.batch_size,), self.settings.sink_size, dtype=torch.int32)
        self.length = torch.zeros_like(self.start)
        # Whether a step came since the last compression: each has its compression once.
        self.due = self.keys.new_zeros((), dtype=torch.bool)
        self.settled, self.restarts = torch.zeros_like(self.seen), torch.zeros_like(self.seen)

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.positions, self.start, self.length], [self.due, self.settled, self.restarts]

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.start.fill_(self.settings.sink_size)

    # -- masks

    def get_query_offset(self) -> int | Tensor:
        """Rows that the new tokens come after: columns of the mask are rows."""
        return self._rows_left() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:  # type: ignore[override]
        """``(columns, rows dropped before attention)``: every old row comes out before the new tokens."""
        if query_length > self.step_tokens:
            rows = int(self.get_query_offset())
            columns = self._as_growing().get_mask_sizes(query_length)[0]
            return columns, rows + query_length - columns
        if self._compresses_first or not self.is_initialized:
            return self.capacity, 0
        return self.capacity, self._dropped(self.length[0] + query_length)

    # -- what the cache asks; these read lengths on the host

    @property
    def rows(self) -> int:
        """Rows held once the compression that is due has run."""
        return int(self._rows_left()) if self.is_initialized else 0

    @property
    def compressions(self) -> int:
        """Compressions so far, with the one that is due."""
        if not self.is_initialized:
            return 0
        return int(self.settled) + bool(self.due & (self._dropped(self.length[0]) > 0))

    def kept_positions(self) -> Tensor:
        """int32 ``[B, H, rows]``: position of every held row, ascending."""
        if not self.rows:
            raise ValueError("kept_positions: this layer has seen no token yet")
        self.settle()
        return self.positions[:, :, : self.rows].clone()

    def uncompressed_bytes(self) -> int:
        """Bytes of the keys and values of every token seen."""
        if not self.is_initialized:
            return 0
        return int(self.seen) * RowBuffer(self.keys, self.values).bytes_per_row

    # -- steps

    def step(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._compresses_first:
            self.settle()
        arrived = torch.arange(key.shape[2], device=self.device)
        rows = self.length[0] + arrived
        positions = (self.seen + arrived).to(torch.int32).expand(*key.shape[:3])
        for slots, new in ((self.keys, key), (self.values, value), (self.positions, positions)):
            slots.index_copy_(2, rows, new)
        self.length.add_(key.shape[2])
        self.seen.add_(key.shape[2])
        self.due.fill_(True)
        if not self._compresses_first:
            self.settle()
        return self.keys, self.values

    def settle(self) -> None:
        """Run the compression that the last step left due; only once attention of that step has run.

        This is ``budget.plan`` on the device. A step of at most ``step_tokens`` tokens sets off one pass at most.
        """
        # Behind the last row there are no partitions: with start there, the operator changes nothing.
        start = torch.where(self.due, self.start, self.length)
        rows = self.length.clone()
        index = torch.ops.lagkv.compress_ragged_(
            self.keys, self.values, start, self.length, **self.settings.operator_arguments
        )
        self.positions.copy_(self.positions.gather(2, index.clamp(min=0).long()))
        again = starts_again(start, self.settings.lag_size, self.max_tokens) & self.due
        self.settled.add_(self.length[0] != rows[0])
        self.restarts.add_(again[0])
        start = torch.where(again, self.settings.sink_size, start)
        self.start.copy_(torch.where(self.due, start, self.start))
        self.due.zero_()

    def take_in(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        growing = self._as_growing()
        key, value = growing.update(key, value)
        kept_key, kept_value = growing.keys, growing.values
        assert kept_key is not None
        assert kept_value is not None
        with plain_tensors():
            for slots, kept in (
                (self.keys, kept_key),
                (self.values, kept_value),
                (self.positions, growing.kept_positions()),
            ):
                slots[:, :, : growing.rows].copy_(kept)
            self.length.fill_(growing.rows)
            self.start.fill_(growing.start)
            self.seen.fill_(growing.seen)
            self.settled.fill_(growing.compressions)
            self.due.zero_()
        return key, value

    def _as_growing(self) -> LagKVLayer:
        """What is held as a layer that grows. It reads the slots and never writes to them: they have no room there."""
        self.check_may_read()
        rows = self.rows
        if not rows:
            return LagKVLayer(self.settings)
        track = Track.of_rows(
            self.settings,
            self.kept_positions(),
            start=int(self.start[0]),
            seen=int(self.seen),
            compressions=self.compressions,
        )
        return LagKVLayer.of_rows(self.keys[:, :, :rows], self.values[:, :, :rows], track)

    # -- lengths

    @property
    def _compresses_first(self) -> bool:
        """Whether a step runs the compression of the step before, and not its own."""
        return self.settings.order == "use_then_compress"

    def _dropped(self, rows: Tensor) -> Tensor:
        """What a compression of so many rows drops."""
        count = ((rows - self.start[0]) // self.settings.lag_size - 1).clamp(min=0)
        return count * (self.settings.lag_size - self.settings.keep)

    def _rows_left(self) -> Tensor:
        """Rows once the compression that is due has run."""
        return self.length[0] - self.due * self._dropped(self.length[0])
