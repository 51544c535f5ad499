"""One full-attention layer: a growth buffer and the recursion of LagKV."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lagkv_ext.cache.budget import Pass, Plan
from lagkv_ext.cache.buffer import RowBuffer, check_new_states, plain_tensors
from lagkv_ext.cache.settings import LayerSettings
from lagkv_ext.cache.track import Track


class LagKVLayer(CacheLayerMixin):
    """Keys and values of one layer, compressed as they grow; their lengths and positions are in its `Track`.

    Memory. A new token is written behind the last row. In decoding, a compression that comes due runs in place, at the
    beginning of the next step: until then attention may still read the rows. After a prompt or a long chunk
    attention gets the full states, only a compressed copy is kept, and the full states die when the model lets go of
    them: a prompt costs the compressed cache plus the states of one layer. The lengths are those after the
    compression as soon as it is due; only the rows come later.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = (
        True  # without a trace while the past is recorded, as for the sliding-window layers of transformers
    )

    def __init__(self, settings: LayerSettings):
        # Not the base class's __init__: it assigns keys and values, which are properties here.
        self.settings = settings
        self.record_past = False
        self.reset()

    @classmethod
    def of_rows(cls, key: Tensor, value: Tensor, track: Track) -> LagKVLayer:
        """A layer that holds these rows, which it reads and never writes to, and goes on from there."""
        layer = cls(track.settings)
        layer.take_rows(key, value, track)
        return layer

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.is_initialized = False
        self._buffer: RowBuffer | None = None
        self._due: tuple[Pass, ...] = ()  # compressions accounted for while their rows are still in place
        self._track = Track(self.settings)

    def take_rows(self, key: Tensor, value: Tensor, track: Track) -> None:
        """Hold these rows instead, without a copy, and go on from there."""
        LagKVLayer.lazy_initialization(self, key, value)
        self._buffer = RowBuffer(key, value)
        self._track = track

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

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions count."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(rows that attention will see, position of the first if they were contiguous)``.

        The offset puts the ``query_length`` new rows at their true positions, so that they are causal among
        themselves; every older row comes out at a position before them, so that all new tokens see it.
        """
        rows = self.rows + query_length - self._dropped(self._count_before_use(query_length))
        return rows, self.seen + query_length - rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffer = RowBuffer.empty(key_states, value_states)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override] # an attribute in the base class
        """The held keys ``[B, H, rows, Dk]``, a view."""
        self.settle()
        return None if self._buffer is None else self._buffer.key

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The held values ``[B, H, rows, Dv]``, a view."""
        self.settle()
        return None if self._buffer is None else self._buffer.value

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in new tokens ``[B, H, n, D]``; returns the keys and values that attention of this step sees.

        Raises:
            RuntimeError: states that require grad while gradients are recorded.
            ValueError: states unlike those held (batch, heads, head dim, dtype, device).
        """
        check_new_states(key_states, value_states)
        if self._buffer is not None:
            self._buffer.check_states(key_states, value_states)
        self.settle()
        if self._buffer is None:
            self.lazy_initialization(key_states, value_states)
        buffer = self._buffer
        assert buffer is not None
        new = key_states.shape[2]
        before_use = self._count_before_use(new)
        planned = None if self.record_past else self._track.plan(new)
        self._track.append(new)
        total = self.rows
        if planned is not None and planned.passes:
            partly = 0 < before_use < planned.passes[0].count
            if total > buffer.capacity or partly or len(planned.passes) > 1:
                return self._replace(key_states, value_states, planned, before_use)
        if total > buffer.capacity:
            buffer.reallocate(self._capacity_for(total))
        buffer.append(key_states, value_states)
        if planned is not None and planned.passes:
            self._due = planned.passes
            self._track.account(planned)
            if before_use:
                self.settle()
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
        if tokens_to_remove > 0:
            raise ValueError(
                "crop takes the number of tokens to remove as a negative number (as transformers does), "
                f"got {tokens_to_remove}"
            )
        recent = self._track.recent
        if self.compressions and -tokens_to_remove > recent:
            raise ValueError(
                f"crop would undo a compression: asked to remove {-tokens_to_remove} tokens, but only the last "
                f"{recent} of the {self.seen} tokens seen are all still there (compressions so far: "
                f"{self.compressions}, rows held: {self.rows})"
            )

    def activate_past_recording(self) -> None:
        """From now on compress in `crop` alone, which assisted decoding calls after every step: a rejected token then
        never decides what is kept."""
        self.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))

    # -- what the cache asks beyond that

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move or convert what is held; later states must come on that device and in that dtype."""
        self._map(lambda x: x.to(device, dtype if x.is_floating_point() else None))
        if self._buffer is not None:
            self.device, self.dtype = self._buffer.key.device, self._buffer.key.dtype

    def kept_positions(self) -> Tensor:
        """int32 ``[B, H, rows]``: position of every held row, ascending."""
        self.settle()
        if self._buffer is None:
            raise ValueError("kept_positions: this layer has seen no token yet")
        batch, heads = self._buffer.key.shape[:2]
        return self._track.positions(batch, heads, self._buffer.key.device)

    def storages(self) -> list[Tensor]:
        """The tensors that this layer keeps alive."""
        tensors = [] if self._buffer is None else self._buffer.storages
        return tensors if self._track.chosen is None else [*tensors, self._track.chosen]

    def uncompressed_bytes(self) -> int:
        """Bytes of the keys and values of every token seen."""
        return 0 if self._buffer is None else self.seen * self._buffer.bytes_per_row

    def settle(self) -> None:
        """Run the compressions that the last step left due; only once attention of that step has run."""
        if not self._due:
            return
        assert self._buffer is not None
        passes, self._due = self._due, ()
        with plain_tensors():
            for done in passes:
                index = torch.ops.lagkv.compress_(
                    self._buffer.key, self._buffer.value, done.start, **self.settings.operator_arguments
                )
                self._buffer.rows -= self._dropped(done.count)
                self._track.record(index, done)

    # -- compression

    def _count_before_use(self, new: int) -> int:
        """Partitions compressed before attention of this step: those without new tokens, which all must be seen."""
        if self.settings.order == "use_then_compress":
            return 0
        old = max(self.rows - self.start, 0) // self.settings.lag_size
        due = 0 if self.record_past else self.settings.compressed_count(self.rows + new, self.start)
        return min(old, due)

    def _dropped(self, count: int) -> int:
        return count * (self.settings.lag_size - self.settings.keep)

    def _replace(self, key: Tensor, value: Tensor, planned: Plan, before_use: int) -> tuple[Tensor, Tensor]:
        """Compress into new storage of exactly the rows that stay. The full states belong to the caller alone."""
        assert self._buffer is not None
        with plain_tensors():
            if self._buffer.rows:
                key = torch.cat([self._buffer.key, key], dim=2)
                value = torch.cat([self._buffer.value, value], dim=2)
            self._buffer = None  # the old rows are free before the new ones come
            self._track.account(planned)
            first = planned.passes[0]
            once_key, once_value, index = self._compress(key, value, first.start)
            self._track.record(index, first)
            new_key, new_value = once_key, once_value
            for done in planned.passes[1:]:
                new_key, new_value, index = self._compress(new_key, new_value, done.start)
                self._track.record(index, done)
            self._buffer = RowBuffer(new_key, new_value)
            if before_use == 0:
                return key, value
            if before_use == first.count:
                return once_key, once_value
            # Some new tokens are among what is dropped: for this step compress only the partitions before them.
            end = first.start + (before_use + 1) * self.settings.lag_size
            old_key, old_value, _ = self._compress(key[:, :, :end], value[:, :, :end], first.start)
            key = torch.cat([old_key, key[:, :, end:]], dim=2)
            return key, torch.cat([old_value, value[:, :, end:]], dim=2)

    def _compress(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        # The operator takes any strides but those of a last dimension that is not contiguous.
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
        return torch.ops.lagkv.compress(key, value, start, **self.settings.operator_arguments)

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

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._buffer is None:
            return
        self.settle()
        self._buffer.map(change)
        with plain_tensors():
            self._track.map(change)
