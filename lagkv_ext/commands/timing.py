"""Measuring fairly: candidates take turns in one process on the same memory and are compared round by round.

Machine noise (another process, a clock that changes) meets the candidates of one round alike, so the ratio of two
candidates is taken within each round, and the median is taken of the ratios.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Used where the size of the last-level cache cannot be read.
_DEFAULT_CACHE_BYTES = 64 << 20


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Candidate:
    """Something to be timed. ``prepare`` runs before every ``run``, untimed: it restores what ``run`` changes.

    What ``run`` returns is freed outside of the timed region.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] = _nothing
    times_itself: bool = False  #: ``run`` returns the seconds it took: a worker in another process


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values; ``best`` is the lowest."""

    median: float
    q1: float
    q3: float
    best: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("the spread of no values")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, min(values), len(values))

    def scaled(self, factor: float) -> Spread:
        """The spread of the values times a positive factor."""
        return Spread(
            self.median * factor, self.q1 * factor, self.q3 * factor, self.best * factor, self.count
        )


@dataclass
class Measurement:
    """Seconds per candidate and round; a candidate that used up its budget misses the later rounds."""

    rounds: dict[str, dict[int, float]] = field(default_factory=dict)

    def seconds(self, name: str) -> Spread:
        return Spread.of(list(self.rounds[name].values()))

    def ratio(self, name: str, other: str) -> Spread:
        """Time of ``name`` over time of ``other``, round by round."""
        a, b = self.rounds[name], self.rounds[other]
        return Spread.of([a[i] / b[i] for i in a if i in b])


def measure(
    candidates: Sequence[Candidate],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 15,
    warmup: int = 2,
    cold: bool = True,
    budget_s: float = 10.0,
    least_rounds: int = 3,
    seed: int = 0,
) -> Measurement:
    """Time the candidates in turns, in an order that is drawn anew for every round.

    Args:
        device: CPU: wall clock around ``run``. CUDA: events on the device's current stream around it.
        rounds: turns of every candidate; a slow one stops after ``least_rounds`` once it has used ``budget_s`` seconds.
        warmup: untimed turns before (1 where a turn takes over a second): compilation, page faults, thread pools.
        cold: overwrite a buffer of twice the last-level cache (CUDA: L2) between ``prepare`` and ``run``, so that
            nobody profits from what ``prepare`` or a competitor left there. Else caches are as ``prepare`` leaves them.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if len({candidate.name for candidate in candidates}) != len(candidates):
        raise ValueError(f"candidates must have different names, got {[c.name for c in candidates]}")
    device = torch.device(device)
    clock = _cuda_seconds if device.type == "cuda" else _wall_seconds
    flush = cache_flusher(device) if cold else _nothing
    for candidate in candidates:
        for _ in range(max(1, warmup)):
            candidate.prepare()
            begin = time.perf_counter()
            candidate.run()
            if time.perf_counter() - begin > 1:
                break
    result = Measurement({candidate.name: {} for candidate in candidates})
    spent = dict.fromkeys(result.rounds, 0.0)
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shuffle(order)
            for candidate in order:
                if turn >= least_rounds and spent[candidate.name] > budget_s:
                    continue
                candidate.prepare()
                flush()
                if candidate.times_itself:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds = candidate.run()
                else:
                    seconds = clock(candidate.run, device)
                result.rounds[candidate.name][turn] = seconds
                spent[candidate.name] += seconds
    finally:
        if collecting:
            gc.enable()
    return result


def cache_flusher(device: torch.device) -> Callable[[], None]:
    """A function that leaves none of its caller's data in the last-level cache."""
    buffer = torch.zeros(2 * cache_bytes(device), dtype=torch.uint8, device=device)

    def flush() -> None:
        buffer.add_(1)

    return flush


def cache_bytes(device: torch.device | str) -> int:
    """Size of the last-level cache (CUDA: L2) as the system tells it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or _DEFAULT_CACHE_BYTES
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[-1]])
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def available_bytes(device: torch.device | str) -> int:
    """Memory that can be allocated now: CUDA's free memory; MemAvailable, or what the control group leaves."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    facts = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    free = facts["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="ascii")))
    return free


def _wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter_ns()
    result = run()
    seconds = (time.perf_counter_ns() - begin) * 1e-9
    del result
    return seconds


def _cuda_seconds(run: Callable[[], Any], device: torch.device) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)  # of the device that runs, which need not be the current one
    # The flush before this is still running on the device while the launches of run are queued, so their latency on
    # the host stays out of the time.
    begin.record(stream)
    result = run()
    end.record(stream)
    end.synchronize()
    del result
    return begin.elapsed_time(end) * 1e-3
