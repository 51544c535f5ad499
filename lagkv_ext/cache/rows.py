"""What every layer of ``LagKVCache`` has in common: rows in a growth buffer, and what transformers asks of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lagkv_ext.cache.buffer import RowBuffer, check_new_states
from lagkv_ext.cache.settings import LayerSettings
from lagkv_ext.cache.timer import CompressionTimer


class RowLayer(CacheLayerMixin):
    """Keys and values in a `RowBuffer`, whose due compressions run in `settle`, before anyone reads or changes them."""

    is_sliding = False
    is_compileable = False
    is_croppable = (
        True  # without a trace while the past is recorded, as for the sliding-window layers of transformers
    )
    timer: CompressionTimer | None = None  #: of whoever watches the cache; outlives `reset`

    def __init__(self, settings: LayerSettings):
        # Not the base class's __init__: it assigns keys and values, which are properties here.
        self.settings = settings
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.is_initialized = False
        self._arrival: torch.Event | None = None  # when what went to the CPU has come there
        self._buffer = None

    @property
    def _buffer(self) -> RowBuffer | None:
        """The rows, and with them whatever else is held, there to be read: the host waits for a copy of `offload`."""
        arrival = (
            self._arrival
        )  # left as it is: a monitor may read in another thread while the layer goes again
        if arrival is not None:
            arrival.synchronize()
        return self._rows_held

    @_buffer.setter
    def _buffer(self, buffer: RowBuffer | None) -> None:
        self._rows_held = buffer

    def settle(self) -> None:
        """Run the compressions that the last step left due; only once attention of that step has run."""
        raise NotImplementedError

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor held by ``change`` of it, once what is due has run."""
        if self._buffer is not None:
            self.settle()
            self._map_as_is(change)

    def _map_as_is(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same while attention may still read the rows as they are."""
        raise NotImplementedError

    @property
    def seen(self) -> int:
        raise NotImplementedError

    # -- what transformers asks

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions count."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

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

    def activate_past_recording(self) -> None:
        """From now on compress in `crop` alone, which assisted decoding calls after every step: a rejected token then
        never decides what is kept."""
        self.record_past = True

    def offload(self) -> None:
        """Move what is held to the CPU. transformers does so before attention has run: what it was given stays as it
        is, and a compression that is due still waits for the next step. The host does not wait for the copy."""
        if self._buffer is not None and self._buffer.key.device.type != "cpu":
            self._map_as_is(lambda x: x.to("cpu", non_blocking=True))
            arrival = torch.Event(self.device)
            arrival.record(torch.accelerator.current_stream(self.device))
            self._arrival = arrival

    def prefetch(self) -> None:
        """Move what is held back to the device of the states, on the current stream, which waits for `offload` in the
        host's place."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            torch.accelerator.current_stream(self.device).wait_event(arrival)
        if self._buffer is not None:
            self._map_as_is(lambda x: x.to(self.device, non_blocking=True))

    # -- what the cache asks beyond that

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move or convert what is held; later states must come on that device and in that dtype. What is due still
        waits for the next step: accelerate calls this in the middle of one."""
        if self._buffer is not None:
            self._map_as_is(lambda x: x.to(device, dtype if x.is_floating_point() else None))
            self.device, self.dtype = self._buffer.key.device, self._buffer.key.dtype

    def uncompressed_bytes(self) -> int:
        """Bytes of the keys and values of every token seen."""
        buffer = self._buffer  # read once: a monitor asks from another thread while steps replace it
        return 0 if buffer is None else self.seen * buffer.bytes_per_row

    # -- steps in common

    def _ready(self, key: Tensor, value: Tensor) -> RowBuffer:
        """Check new states, run what is due, and return the buffer they go to."""
        check_new_states(key, value)
        if self._buffer is not None:
            self._buffer.check_states(key, value)
        self.settle()
        if self._buffer is None:
            self.lazy_initialization(key, value)
        assert self._buffer is not None
        return self._buffer

    def _compress(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        # The operator takes any strides but those of a last dimension that is not contiguous.
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
        with self._timed(key):
            return torch.ops.lagkv.compress(key, value, start, **self.settings.operator_arguments)

    def _timed(self, states: Tensor) -> contextlib.AbstractContextManager:
        """Around every call of an operator that compresses."""
        timer = self.timer  # read once: whoever watched may leave at any time, in another thread
        return contextlib.nullcontext() if timer is None else timer.timing(states.device)

    def _dropped(self, count: int) -> int:
        return count * (self.settings.lag_size - self.settings.keep)


def check_crop_number(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(
            "crop takes the number of tokens to remove as a negative number (as transformers does), "
            f"got {tokens_to_remove}"
        )
