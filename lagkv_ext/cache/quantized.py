"""One full-attention layer whose settled rows are quantised: the ones that a compression chose, and the sink."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lagkv_ext.cache.budget import Plan
from lagkv_ext.cache.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.layer import LagKVLayer
from lagkv_ext.cache.quantizer import QuantizedRows, quantize
from lagkv_ext.cache.track import Track


class QuantizedLagKVLayer(LagKVLayer):
    """Compress first, quantise what stays. The rows after the chosen ones, at most two partitions and a remainder, are
    held as they came, so every partition is scored once as it was given: the same tokens stay as without
    quantisation. A row is quantised once, when it has been chosen; later its code moves with it. Under a token budget,
    where chosen rows are scored again, what is scored is what their codes stand for.

    A layer that drops nothing quantises all but its last ``lag_size`` to ``2 lag_size`` rows.

    Attention of a step gets rows made from the codes for it, memory of one layer at a time.
    """

    def reset(self) -> None:
        super().reset()
        self._quantized: tuple[QuantizedRows, QuantizedRows] | None = None  # keys and values

    @property
    def quantized_rows(self) -> int:
        return 0 if self._quantized is None else self._quantized[0].rows

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The held keys ``[B, H, rows, Dk]``, those quantised made from their codes."""
        return None if self._buffer is None else self._all_rows()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self._buffer is None else self._all_rows()[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As `LagKVLayer.update`."""
        buffer = self._ready(key_states, value_states)
        new = key_states.shape[2]
        planned = None if self.record_past else self._track.plan(new)
        self._track.append(new)
        if planned is not None and planned.passes:
            return self._replace(key_states, value_states, planned)
        total = buffer.rows + new
        if total > buffer.capacity:
            most = self.settings.sink_size + 2 * self.settings.lag_size  # before the next rows are quantised
            buffer.reallocate(min(2 * total, most) if total <= most else total + total // 16)
        buffer.append(key_states, value_states)
        seen = self._all_rows()
        if not self.record_past:
            self._quantize_old_rows()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """As `LagKVLayer.crop`."""
        self.check_crop(tokens_to_remove)
        if self._buffer is None:
            return
        removed = min(-tokens_to_remove, self.rows)
        self._track.remove(removed)
        self._buffer.rows -= removed
        if self.record_past:
            planned = self._track.plan()
            if planned.passes:
                empty = self._buffer.key[:, :, :0], self._buffer.value[:, :, :0]
                self._replace(*empty, planned)
            self._quantize_old_rows()

    def check_crop(self, tokens_to_remove: int) -> None:
        super().check_crop(tokens_to_remove)
        if self._buffer is not None and self.quantized_rows and -tokens_to_remove > self._buffer.rows:
            raise ValueError(
                f"crop would remove quantised rows: asked to remove {-tokens_to_remove} tokens, but only the last "
                f"{self._buffer.rows} of the {self.seen} tokens seen are held as they came"
            )

    def storages(self) -> list[Tensor]:
        return super().storages() + [x for rows in self._quantized or () for x in rows.storages]

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        if dtype is not None and self._buffer is not None and dtype != self.dtype:
            raise ValueError(
                f"a quantised layer stays in the dtype that it was filled in ({self.dtype}), got {dtype}"
            )
        super().to(device, None)

    def take_quantized(
        self, key: Tensor, value: Tensor, track: Track, quantized: tuple[QuantizedRows, QuantizedRows] | None
    ) -> None:
        """Hold these rows, those quantised first, and go on from there."""
        self.take_rows(key, value, track)
        self._quantized = quantized

    # -- rows

    def _all_rows(self) -> tuple[Tensor, Tensor]:
        assert self._buffer is not None
        if self._quantized is None:
            return self._buffer.key, self._buffer.value
        plain = self._buffer.key, self._buffer.value
        key, value = (
            torch.cat([coded.dequantize(), rows], dim=2)
            for coded, rows in zip(self._quantized, plain, strict=True)
        )
        return key, value

    def _replace(self, key: Tensor, value: Tensor, planned: Plan) -> tuple[Tensor, Tensor]:
        assert self._buffer is not None
        with plain_tensors():
            held, quantized = self._all_rows(), self._quantized
            if held[0].shape[2]:
                key, value = (torch.cat(x, dim=2) for x in zip(held, (key, value), strict=True))
            before = None
            if quantized is not None and min(x.start for x in planned.passes) < self.quantized_rows:
                before = self._positions(key)[:, :, : self.quantized_rows].contiguous()
            self._buffer = RowBuffer.empty(key, value)  # its rows are among these now
            seen = super()._replace(key, value, planned)
            buffer, settled = self._buffer, self.rows - self._track.recent
            rows = buffer.key, buffer.value
            if before is None:
                unchanged = self.quantized_rows  # these come first, as they were
                self._quantized = self._joined([x[:, :, unchanged:settled] for x in rows])
            else:
                assert quantized is not None
                now = self._positions(key)[:, :, :settled].contiguous()
                index = torch.searchsorted(before, now).clamp(max=before.shape[2] - 1)
                moved = before.gather(2, index) == now
                fresh = (quantize(x[:, :, :settled], str(self.settings.quantization)) for x in rows)
                key_rows, value_rows = (
                    new.replaced(index, moved, old) for new, old in zip(fresh, quantized, strict=True)
                )
                self._quantized = key_rows, value_rows
            self._buffer = RowBuffer(*(x[:, :, settled:].clone() for x in rows))
        return seen

    def _quantize_old_rows(self) -> None:
        """Where nothing is ever dropped: all but the last ``lag_size`` rows, once there are twice as many."""
        buffer, recent = self._buffer, self.settings.lag_size
        if self.settings.compresses or buffer is None or buffer.rows < 2 * recent:
            return
        with plain_tensors():
            old = buffer.rows - recent
            self._quantized = self._joined([x[:, :, :old] for x in (buffer.key, buffer.value)])
            self._buffer = RowBuffer(*(x[:, :, old:].clone() for x in (buffer.key, buffer.value)))

    def _joined(self, rows: list[Tensor]) -> tuple[QuantizedRows, QuantizedRows]:
        """What is quantised, and these rows of keys and values after it."""
        key, value = (quantize(x, str(self.settings.quantization)) for x in rows)
        if self._quantized is None:
            return key, value
        return self._quantized[0].joined(key), self._quantized[1].joined(value)

    def _positions(self, like: Tensor) -> Tensor:
        return self._track.positions(like.shape[0], like.shape[1], like.device)

    def _map_as_is(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_as_is(change)
        if self._quantized is not None:
            with plain_tensors():
                self._quantized = self._quantized[0].map(change), self._quantized[1].map(change)
