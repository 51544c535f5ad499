"""Measures how long compressions of a cache take, without waiting for a device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class CompressionTimer:
    """Adds up the time in the operators that compress; a cache has one while somebody watches it.

    On the CPU it is wall time. On CUDA it is the time between two events around the operator on the current stream,
    counted once the device has passed them. Other devices are not timed. What surrounds the operators (joining the
    chunks of a prompt, quantising rows) does not count.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """Around one call of an operator on ``device``."""
        if device.type == "cpu":
            begun = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begun
        elif device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((begin, end))
        else:
            yield

    @property
    def waits(self) -> bool:
        """Tells whether there are events that `take` has not counted yet."""
        return bool(self._events)

    def take(self) -> float:
        """Seconds that were completed since the last call. Waits for nothing: what the device still has before it is
        left for a later call."""
        seconds, self._seconds = self._seconds, 0.0
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            seconds += begin.elapsed_time(end) / 1000
        return seconds

    def __deepcopy__(self, memo: dict) -> None:
        """The copy of a cache is not watched."""
        return None
