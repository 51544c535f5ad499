"""Rows of which the settled ones are quantised: those that a compression chose, and the sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lagkv_ext.cache.compression.compressor import Compressor
from lagkv_ext.cache.compression.plan import Pass
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.growing.buffer import RowBuffer, plain_tensors
from lagkv_ext.cache.quantized.quantizer import QuantizedRows, quantize
from lagkv_ext.cache.rows import Rows
from lagkv_ext.cache.settings import LayerSettings

Pair = tuple[QuantizedRows, QuantizedRows]


class CodedRows(Rows):
    """Codes of the settled rows, a `RowBuffer` of the recent ones, and one `Track`.

    Rows are compressed first and quantised after that. The rows after the chosen ones, at most two partitions and a
    remainder, are held as they came, so every partition is scored once with the given numbers: the same tokens are kept
    as without quantisation. A row is quantised once, when it has been chosen; later its code moves with it. Under a
    token budget, where chosen rows are scored again, their dequantised numbers are scored; carried scores stay those
    of the rows as they came.

    A layer that drops nothing quantises all but its last ``lag_size`` to ``2 lag_size`` rows.

    Attention of a step gets rows dequantised for it, memory of one layer at a time.
    """

    def __init__(self, settings: LayerSettings, compressor: Compressor):
        super().__init__(settings, compressor)
        self.track = Track(settings)
        self.buffer: RowBuffer | None = None
        self.codes: Pair | None = None  #: keys and values
        self._held: tuple[tuple[Pass, ...], Track] | None = (
            None  # of a held step: what is due, the track before
        )

    @classmethod
    def of_rows(
        cls, compressor: Compressor, key: Tensor, value: Tensor, track: Track, codes: Pair | None
    ) -> CodedRows:
        """Rows after those in ``codes``, and the track of both."""
        rows = cls(track.settings, compressor)
        rows.buffer, rows.track, rows.codes = RowBuffer(key, value), track, codes
        return rows

    @property
    def tracks(self) -> tuple[Track, ...]:
        return (self.track,)

    @property
    def seen(self) -> int:
        return self.track.seen

    @property
    def coded(self) -> int:
        """Rows that are quantised."""
        return 0 if self.codes is None else self.codes[0].rows

    # -- steps

    def check_step(self, new: int) -> None:
        self.track.check_step(new)

    def check_states(self, key: Tensor, value: Tensor) -> None:
        if self.buffer is not None:
            self.buffer.check_states(key, value)

    def take(self, key: Tensor, value: Tensor, *, hold: bool) -> tuple[Tensor, Tensor]:
        self.settle()
        buffer = self.buffer = self.buffer or RowBuffer.empty(key, value)
        before = self.track.copy()
        self.track.append(key.shape[2])
        held, passes = self.track.copy(), self._account()
        if passes and not hold:
            with plain_tensors():
                old = self._all_rows()
                if old[0].shape[2]:
                    key, value = (torch.cat(x, dim=2) for x in zip(old, (key, value), strict=True))
                self._compress(key, value, passes, before)
            return key, value
        total = buffer.rows + key.shape[2]
        if total > buffer.capacity:
            most = self.settings.sink_size + 2 * self.settings.lag_size  # before the next rows are quantised
            buffer.reallocate(min(2 * total, most) if total <= most else total + total // 16)
        buffer.append(key, value)
        seen = self._all_rows()
        if hold:
            self._held = passes, held
        else:
            self._code_old_rows()
        return seen

    def settle(self) -> None:
        """Compress and quantise what a held step left."""
        held, self._held = self._held, None
        if held is None:
            return
        passes, before = held
        if passes:
            with plain_tensors():
                self._compress(*self._all_rows(), passes, before)
        self._code_old_rows()

    def check_crop(self, count: int) -> None:
        track = self.track if self._held is None else self._held[1]
        track.check_removal(count)
        if self.buffer is not None and self.coded and count > self.buffer.rows:
            raise ValueError(
                f"crop would remove quantised rows: asked to remove {count} tokens, but only the last "
                f"{self.buffer.rows} of the {self.seen} tokens seen are held as they came"
            )

    def crop(self, count: int) -> None:
        self.check_crop(count)
        if self.buffer is None:
            return
        if self._held is not None:
            self.track = self._held[1]
        removed = min(count, self.track.rows)
        self.track.remove(removed)
        self.buffer.rows -= removed
        before = self.track.copy()
        self._held = self._account(), before
        self.settle()

    def _account(self) -> tuple[Pass, ...]:
        planned = self.track.plan()
        self.track.account(planned)
        return planned.passes

    # -- contents

    def states(self) -> tuple[Tensor, Tensor] | None:
        self.settle()
        return None if self.buffer is None else self._all_rows()

    def positions(self) -> Tensor | None:
        self.settle()
        if self.buffer is None:
            return None
        return self._positions(self.track, self.buffer.key)

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
        buffer, codes = self.buffer, self.codes  # read once, as above
        tensors = [] if buffer is None else buffer.storages
        return [*tensors, *self.track.tensors(), *(x for rows in codes or () for x in rows.storages)]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.buffer is None:
            return
        self.buffer.map(change)
        with plain_tensors():
            self.track.map(change)
            if self._held is not None:
                self._held[1].map(change)
            if self.codes is not None:
                self.codes = self.codes[0].map(change), self.codes[1].map(change)

    def select(self, sequences: Tensor) -> None:
        self.settle()
        self.map(lambda x: x.index_select(0, sequences.to(x.device)))

    def _all_rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values, those quantised made from their codes."""
        assert self.buffer is not None
        plain = self.buffer.key, self.buffer.value
        if self.codes is None:
            return plain
        key, value = (
            torch.cat([coded.dequantize(), rows], dim=2)
            for coded, rows in zip(self.codes, plain, strict=True)
        )
        return key, value

    @staticmethod
    def _positions(track: Track, like: Tensor) -> Tensor:
        return track.positions(like.shape[0], like.shape[1], like.device)

    # -- codes

    def _compress(self, key: Tensor, value: Tensor, passes: tuple[Pass, ...], before: Track) -> None:
        """Compress all rows and quantise those that are settled then; ``before`` is the track of the old rows."""
        coded, codes = self.coded, self.codes
        old = None
        again = self.settings.carries_scores or min(done.start for done in passes) < coded
        if codes is not None and again:  # coded rows may go
            old = self._positions(before, key)[:, :, :coded].contiguous()
        self.buffer = None  # the old rows are free before the new ones come
        rows = self.compressor.into_new(self.track, passes, key, value)
        settled = self.track.settled
        if old is None:
            self.codes = self._joined([x[:, :, coded:settled] for x in rows])
        else:
            assert codes is not None
            now = self._positions(self.track, key)[:, :, :settled].contiguous()
            self.codes = self._moved(codes, old, now, [x[:, :, :settled] for x in rows])
        self.buffer = RowBuffer(*(x[:, :, settled:].clone() for x in rows))

    def _moved(self, codes: Pair, old: Tensor, now: Tensor, rows: Sequence[Tensor]) -> Pair:
        """Codes of ``rows`` at positions ``now``: those that had one (at positions ``old``) keep it."""
        index = torch.searchsorted(old, now).clamp(max=old.shape[2] - 1)
        had_one = old.gather(2, index) == now
        fresh = (quantize(x, str(self.settings.quantization)) for x in rows)
        key, value = (new.replaced(index, had_one, own) for new, own in zip(fresh, codes, strict=True))
        return key, value

    def _code_old_rows(self) -> None:
        """Quantises a layer that drops nothing: all but the last ``lag_size`` rows, once there are twice as many."""
        buffer, recent = self.buffer, self.settings.lag_size
        if self.settings.compresses or buffer is None or buffer.rows < 2 * recent:
            return
        with plain_tensors():
            old = buffer.rows - recent
            self.codes = self._joined([x[:, :, :old] for x in (buffer.key, buffer.value)])
            self.buffer = RowBuffer(*(x[:, :, old:].clone() for x in (buffer.key, buffer.value)))

    def _joined(self, rows: Sequence[Tensor]) -> Pair:
        """The codes held, and after them those of these rows of keys and values."""
        key, value = (quantize(x, str(self.settings.quantization)) for x in rows)
        if self.codes is None:
            return key, value
        return self.codes[0].joined(key), self.codes[1].joined(value)
