"""One full-attention layer of a growing cache, as transformers talks to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lagkv_ext.cache.compression.compressor import Compressor
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.growing.buffer import checked_states
from lagkv_ext.cache.growing.dense import DenseRows
from lagkv_ext.cache.padded.padding import Padding
from lagkv_ext.cache.padded.rows import PaddedRows
from lagkv_ext.cache.quantized.rows import CodedRows
from lagkv_ext.cache.rows import Rows
from lagkv_ext.cache.settings import LayerSettings


class LagKVLayer(CacheLayerMixin):
    """Keys and values of one layer, compressed as they grow. What is held, and how, is its `Rows`: dense, quantised, or
    (from the first padding to `reset`) padded.

    While the past is recorded (assisted decoding), everything that a step brought can be taken back by `crop`. The mode
    ends with the request that set it: at `reset`, and at the first step that is not followed by `crop`. Results do not
    depend on it: the compression of a step always takes effect before the next one.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, settings: LayerSettings):
        # Not the base class's __init__: it assigns keys and values, which are properties here.
        self.settings = settings
        self._compressor = Compressor(settings)
        self.reset()

    def reset(self) -> None:
        """Forget everything, padding and past recording too, and free the memory."""
        kind = DenseRows if self.settings.quantization is None else CodedRows
        self.hold_rows(kind(self.settings, self._compressor))
        self.is_initialized = False
        self.record_past = False
        self._awaits_crop = False  # a recorded step came, and no crop after it
        self._arrival: torch.Event | None = None  # when rows on their way to the CPU have arrived

    def hold_rows(self, rows: Rows) -> None:
        """Hold these rows instead."""
        self._held = rows

    @property
    def held(self) -> Rows:
        """The rows, readable: the host waits for a copy of `offload`."""
        arrival = (
            self._arrival
        )  # not cleared: a monitor may read in another thread while the layer goes again
        if arrival is not None:
            arrival.synchronize()
        return self._held

    @property
    def is_croppable(self) -> bool:  # type: ignore[override] # an attribute in the base class
        """Tells whether any step may be taken back, as assisted decoding does."""
        return self.settings.boundary is None

    @property
    def compressor(self) -> Compressor:
        return self._compressor

    @property
    def timer(self) -> CompressionTimer | None:
        """Belongs to whoever watches the cache; outlives `reset`."""
        return self._compressor.timer

    @timer.setter
    def timer(self, timer: CompressionTimer | None) -> None:
        self._compressor.timer = timer

    # -- lengths

    @property
    def seen(self) -> int:
        return self._held.seen

    @property
    def rows(self) -> int:
        return self._held.rows

    @property
    def compressions(self) -> int:
        return self._held.compressions

    @property
    def tracks(self) -> tuple[Track, ...]:
        return self._held.tracks

    @property
    def rows_per_sequence(self) -> tuple[int, ...]:
        return tuple(track.rows for track in self._held.tracks)

    @property
    def compressions_per_sequence(self) -> tuple[int, ...]:
        return tuple(track.compressions for track in self._held.tracks)

    @property
    def quantized_rows(self) -> int:
        return self._held.coded if isinstance(self._held, CodedRows) else 0

    # -- transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen, which positions count."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no number of tokens is too many."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(rows that attention will see, position of the first if they were contiguous)``.

        The offset puts the ``query_length`` new rows at their true positions, so that they are causal among
        themselves; every older row comes out at a position before them, so that all new tokens see it. In a padded
        batch these are the rows of the sequence that has most; the others have hidden columns on the left.
        """
        return self.rows + query_length, self.seen - self.rows

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append new tokens ``[B, H, n, D]``; returns the keys and values that attention of this step sees.

        Raises:
            RuntimeError: states that require grad while gradients are recorded.
            ValueError: states unlike those held (batch, heads, head dim, dtype, device).
        """
        key, value = checked_states(key_states, value_states)
        held = self.held
        held.check_states(key, value)
        held.check_step(key.shape[2])
        if not self.is_initialized:
            LagKVLayer.lazy_initialization(self, key, value)
        if self._awaits_crop:
            self.record_past = False
        self._awaits_crop = self.record_past
        return held.take(key, value, hold=self.record_past)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override] # an attribute in the base class
        """The held keys ``[B, H, rows, Dk]``: a view, or made from their codes."""
        states = self.held.states()
        return None if states is None else states[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The held values ``[B, H, rows, Dv]``, likewise."""
        states = self.held.states()
        return None if states is None else states[1]

    def activate_past_recording(self) -> None:
        """Hold every step until `crop`, which assisted decoding calls after it, or the next step: a rejected token then
        never decides what is kept.

        Raises ValueError: with a ``boundary``, over which the candidates of a step would reach.
        """
        if not self.is_croppable:
            raise ValueError(
                f"assisted decoding is not possible with boundary={self.settings.boundary}: a step of candidates would "
                "reach over a boundary"
            )
        self.record_past, self._awaits_crop = True, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, all of them if there are fewer; errors as in `check_crop`."""
        self.check_crop(tokens_to_remove)
        self._awaits_crop = False
        self.held.crop(-tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """ValueError for a positive number (transformers counts negatively), and where a compression would have to be
        undone: the tokens that it chose from are gone."""
        if tokens_to_remove > 0:
            raise ValueError(
                "crop takes the number of tokens to remove as a negative number (as transformers does), "
                f"got {tokens_to_remove}"
            )
        self._held.check_crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda batch: beam_idx)  # left on its device: nothing waits for it

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda batch: batch.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda batch: batch[indices.cpu()])

    def _select(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self._held.batch:
            self.held.select(choose(torch.arange(self._held.batch, device="cpu")))

    def offload(self) -> None:
        """Move the rows to the CPU. transformers does so before attention has run: what attention was given stays
        unchanged, and a compression that is due still waits for the next step. The host does not wait for the copy."""
        tensors = self._held.tensors()
        if tensors and tensors[0].device.type != "cpu":
            self.held.map(lambda x: x.to("cpu", non_blocking=True))
            arrival = torch.Event(self.device)
            arrival.record(torch.accelerator.current_stream(self.device))
            self._arrival = arrival

    def prefetch(self) -> None:
        """Move the rows back to the device of the states, on the current stream, which waits for `offload` in the
        host's place."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            torch.accelerator.current_stream(self.device).wait_event(arrival)
        self._held.map(lambda x: x.to(self.device, non_blocking=True))

    # -- the cache asks

    def pad(self, padding: Padding) -> None:
        """From now on give every sequence lengths of its own."""
        held = self.held
        assert isinstance(held, DenseRows)
        self.hold_rows(PaddedRows.following(held, padding))

    def visible(self, new: int) -> Tensor:
        """bool ``[B, columns]`` on the CPU: columns that attention of a step of ``new`` tokens may see."""
        return self._held.visible(new)

    def kept_positions(self) -> Tensor:
        """int32 ``[B, H, rows]``: position of every held row among the tokens of its sequence, ascending; -1 in the
        hidden columns of a padded batch."""
        positions = self.held.positions()
        if positions is None:
            raise ValueError("kept_positions: this layer has seen no token yet")
        return positions

    def check_step(self, new: int) -> None:
        """ValueError where ``new`` tokens cannot come at once; see `Track.check_step`."""
        self._held.check_step(new)

    def tokens_at_once(self, most: int) -> int:
        """Tokens, up to ``most``, that a step may bring with the result of as many steps of one token: those up to the
        next compression, or 1 where rounding is not all that would differ."""
        return min(self._held.tracks[0].until_due(), most) if isinstance(self._held, DenseRows) else 1

    def settle(self) -> None:
        """Run the compressions that the last step left due; only once attention of that step has run."""
        self.held.settle()

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move or convert the rows; later states must come on that device and in that dtype. What is due still waits
        for the next step: accelerate calls this in the middle of one."""
        if not self._held.tensors():
            return
        if self.settings.quantization is not None and dtype not in (None, self.dtype):
            raise ValueError(
                f"a quantised layer stays in the dtype that it was filled in ({self.dtype}), got {dtype}"
            )
        floats = None if self.settings.quantization is not None else dtype
        self.held.map(lambda x: x.to(device, floats if x.is_floating_point() else None))
        keys = self._held.tensors()[0]
        self.device, self.dtype = keys.device, keys.dtype

    def storages(self) -> list[Tensor]:
        """The tensors that this layer keeps alive."""
        return self.held.tensors()

    def uncompressed_bytes(self) -> int:
        """Bytes of the keys and values of every token seen."""
        held = self._held  # read once: a monitor asks from another thread while the layer changes
        return held.seen * held.bytes_per_token
