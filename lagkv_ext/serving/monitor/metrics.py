"""``CacheMonitor``: what compression does to the requests of a server, in Prometheus metrics."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from lagkv_ext.cache import CacheReport, LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.report import report_of
from lagkv_ext.serving.monitor.families import KINDS, OUTCOMES, READS, CacheFamilies
from lagkv_ext.serving.monitor.registry import REGISTRY, child, join

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_COMPRESSED = (LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache)
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Live:
    """What the requests in flight hold, all together."""

    seen: int = 0
    kept: float = 0.0
    held: int = 0
    uncompressed: int = 0

    def add(self, report: CacheReport) -> None:
        self.seen += report.tokens_seen
        self.kept += min(report.tokens_kept, report.tokens_seen)  # a step may come between the two readings
        self.held += report.bytes_held
        self.uncompressed += report.bytes_uncompressed


@dataclasses.dataclass
class _Flight:
    """A request as the monitor knows it. Nothing here keeps the cache or the request alive."""

    cache: weakref.ref
    kind: str
    timer: CompressionTimer
    before: CacheReport | None = None
    begun: float = 0.0
    last: CacheReport | None = None  #: what the scrape before found


class _OfKind:
    """The series of the requests with one kind of cache."""

    def __init__(self, metrics: CacheFamilies, values: tuple[str, ...]):
        self.requests = {x: child(metrics.requests, *values, x) for x in OUTCOMES}
        self.bytes = {x: child(metrics.bytes, *values, x) for x in ("held", "uncompressed")}
        shared = metrics.in_flight, metrics.duration, metrics.seen
        self.in_flight, self.duration, self.seen = (child(x, *values) for x in shared)


class CacheMonitor:
    """Reports the caches of one model on a Prometheus registry.

    ::

        monitor = CacheMonitor(labels={"model": "llama-3.1-8b"})  # once, when the server starts
        with monitor.request(cache):  # around each request
            model.generate(**inputs, past_key_values=cache)

    While a request is in flight, every scrape reads its cache where it stands, from the thread of the scrape: that
    takes nothing from the generating thread but its turn of the interpreter, never raises, and never keeps a cache
    alive. When it ends, counters and histograms take what it added. What each metric means is in docs/operations.md.

    A static cache whose lengths lie on a device is not read at scrapes, which would wait for the device and break
    a CUDA graph that is being captured: it counts as "skipped" there, and in full when its request ends.

    Cost: nothing per token; per request two reports of the cache (one where it was empty before), per compression two
    readings of a clock. A cache of 32 layers on a busy 2-core CPU: 0.2 to 0.3 ms a request, 2 microseconds a
    compression, 6 ms a scrape with 32 such caches in flight (``python -m benchmarks.monitor``).

    Several monitors may report on one registry, as one for each model of a server, with the same label names and
    different values. In servers of several processes see "Watching it" in docs/operations.md.

    Args:
        registry: where the metrics are exported; prometheus_client's own by default.
        labels: names and values that every metric gets, as ``{"model": "llama-3.1-8b"}``; none by default.

    Raises:
        TypeError, ValueError: a wrong argument; labels that the registry's other monitors do not have, or that one of
            them already reports under.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, labels: Mapping[str, str] | None = None):
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight] = {}
        self._number = 0
        # Of requests that were dropped without an end. Filled by the garbage collector, which may run anywhere, even
        # while this thread holds a lock: so nothing but an append happens there.
        self._lost: deque[int] = deque()
        # Of ended requests, with events that the device had not passed.
        self._late: list[CompressionTimer] = []
        metrics, values = join(CacheFamilies, registry, labels)
        # Made now, so that every series is there, at 0, before the first request.
        self._of_kind = {kind: _OfKind(metrics, (*values, kind)) for kind in KINDS}
        self._reads = {x: child(metrics.reads, *values, x) for x in READS}
        compressing = metrics.kept, metrics.dropped, metrics.compressions, metrics.seconds
        self._kept, self._dropped, self._compressions, self._seconds = (
            child(x, *values) for x in compressing
        )
        metrics.admit(values, self)
        self._leave = functools.partial(metrics.leave, values, self)
        self._closed = False

    def close(self) -> None:
        """No more requests: another monitor may report under these labels, as that of a model that was loaded again.
        Counters stay and count on there. Requests in flight count when they finish, and are not read by scrapes."""
        self._forget_lost()
        self._closed = True
        self._leave()

    def request(self, cache: Cache) -> MonitoredRequest:
        """A request begins, in which ``cache`` is used. Keep what is returned: as a context manager, or until you call
        its `MonitoredRequest.finish`.

        Any cache of transformers: in metrics with the label "cache" those that LagKV compresses are "lagkv", all
        others "full". A cache may be used for one request after another: each counts what it added.

        Raises:
            TypeError: no cache of transformers.
            ValueError: the cache is in a request that has not ended.
            RuntimeError: the monitor is closed.
        """
        if self._closed:
            raise RuntimeError("request: this monitor is closed")
        if not isinstance(cache, Cache):
            raise TypeError(f"cache must be a cache of transformers, got {type(cache).__name__}")
        self._forget_lost()
        kind, timer = "full", CompressionTimer()
        with self._lock:
            watched = any(x.cache() is cache for x in self._flights.values())
            if watched or (isinstance(cache, _COMPRESSED) and cache.timer is not None):
                raise ValueError("cache must not be in a request that has not ended, got one that is")
            if isinstance(cache, _COMPRESSED):
                kind, cache.timer = "lagkv", timer
            self._number += 1
            number = self._number
            flight = self._flights[number] = _Flight(weakref.ref(cache), kind, timer)
        flight.before = self._report(cache)
        self._of_kind[kind].in_flight.inc()
        flight.begun = time.perf_counter()
        return MonitoredRequest(self, number)

    # -- at a scrape

    def read_live(self) -> dict[str, Live]:
        """What the caches in flight hold now, by kind. Called by scrapes, from any thread; raises nothing."""
        self._forget_lost()
        with self._lock:
            flights = list(self._flights.values())
        live = {kind: Live() for kind in KINDS}
        for flight in flights:
            cache = flight.cache()
            if cache is None:
                continue  # said when the request ends
            report = self._report(cache, at_scrape=True)
            if report is not None:
                flight.last = _whole(report, flight.last)
                live[flight.kind].add(flight.last)
        return live

    # -- when a request ends

    def finish(self, number: int, outcome: str) -> None:
        """For `MonitoredRequest`."""
        flight = self._end(number, outcome)
        if outcome == "completed":
            self._of_kind[flight.kind].duration.observe(time.perf_counter() - flight.begun)
        cache = flight.cache()
        if cache is None:
            self._reads["failed"].inc()
            _log.warning("a cache was deleted before its request ended: what it held is not counted")
            return
        after = self._report(cache)
        if flight.before is not None and after is not None:
            self._count(flight.kind, flight.before, after)

    def _count(self, kind: str, before: CacheReport, after: CacheReport) -> None:
        added = [now - then for now, then in zip(_growing(after), _growing(before), strict=True)]
        if min(added) < -0.5:  # it was reset since: as Prometheus does with a counter that starts again
            added = list(_growing(after))
        seen, dropped, compressions = (max(x, 0) for x in added)  # averages have rounding errors
        series = self._of_kind[kind]
        series.seen.inc(seen)
        series.bytes["held"].inc(after.bytes_held)
        series.bytes["uncompressed"].inc(after.bytes_uncompressed)
        if kind == "lagkv":
            self._dropped.inc(dropped)
            self._compressions.inc(compressions)
            if after.tokens_seen:
                self._kept.observe(after.tokens_kept / after.tokens_seen)

    def _end(self, number: int, outcome: str) -> _Flight:
        with self._lock:
            flight = self._land(number)
        self._count_end(flight, outcome)
        return flight

    def _forget_lost(self) -> None:
        lost = []
        with self._lock:
            while self._lost:
                lost.append(self._land(self._lost.popleft()))
        for flight in lost:
            self._count_end(flight, "abandoned")

    def _land(self, number: int) -> _Flight:
        """With the lock held: from here on the cache may be in another request."""
        flight = self._flights.pop(number)
        cache = flight.cache()
        if isinstance(cache, _COMPRESSED):
            cache.timer = None
        return flight

    def _count_end(self, flight: _Flight, outcome: str) -> None:
        self._of_kind[flight.kind].in_flight.dec()
        self._of_kind[flight.kind].requests[outcome].inc()
        self._seconds.inc(self._seconds_of(flight.timer))

    def _seconds_of(self, timer: CompressionTimer) -> float:
        """Of this timer, and what is known only now of earlier ones."""
        seconds = 0.0
        with self._lock:
            timers, self._late = [*self._late, timer], []
            for late in timers:
                try:
                    seconds += late.take()
                except Exception:  # of a device that failed: the request counts all the same
                    _log.warning("the time of compressions could not be read", exc_info=True)
                    continue
                if late.waits:
                    self._late.append(late)
        return seconds

    def lose(self, number: int) -> None:
        """For `MonitoredRequest`: nobody can end this request any more."""
        self._lost.append(number)

    def _report(self, cache: Cache, at_scrape: bool = False) -> CacheReport | None:
        try:
            if at_scrape and _lengths_on_device(cache):
                self._reads["skipped"].inc()
                return None
            report = report_of(cache)
        except Exception:  # a server must not lose a request, nor a scrape, to its monitoring
            self._reads["failed"].inc()
            _log.warning("a cache could not be read for its metrics", exc_info=True)
            return None
        self._reads["read"].inc()
        return report


class MonitoredRequest:
    """What `CacheMonitor.request` returns. Leaving the ``with`` block ends the request: completed, "failed" where an
    `Exception` leaves it, "cancelled" where something else does (`asyncio.CancelledError`, `KeyboardInterrupt`).
    A request that is dropped without an end counts as "abandoned"."""

    def __init__(self, monitor: CacheMonitor, number: int):
        self._monitor = monitor
        self._number: int | None = number

    def finish(self, outcome: str = "completed") -> None:
        """End it, in the thread that used the cache: "completed", "failed" or "cancelled".

        Raises:
            ValueError: another outcome.
            RuntimeError: it has ended already.
        """
        if outcome not in OUTCOMES[:-1]:
            raise ValueError(f"outcome must be {' or '.join(map(repr, OUTCOMES[:-1]))}, got {outcome!r}")
        number, self._number = self._number, None
        if number is None:
            raise RuntimeError("finish: this request has ended already")
        self._monitor.finish(number, outcome)

    def __enter__(self) -> MonitoredRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._number is not None:
            failed = kind is not None and issubclass(kind, Exception)
            self.finish("failed" if failed else "completed" if kind is None else "cancelled")

    def __del__(self) -> None:
        number = getattr(self, "_number", None)
        if number is not None:
            self._monitor.lose(number)


def _growing(report: CacheReport) -> tuple[float, float, float]:
    """What only grows while a cache is used: tokens seen, tokens dropped, compressions."""
    return report.tokens_seen, report.tokens_seen - report.tokens_kept, report.compressions


def _lengths_on_device(cache: Cache) -> bool:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    static = (x for x in list(cache.layers) if isinstance(x, CacheLayerMixin) and x.is_compileable)
    devices = (getattr(layer, "device", None) for layer in static)
    return any(device is not None and torch.device(device).type != "cpu" for device in devices)


def _whole(report: CacheReport, last: CacheReport | None) -> CacheReport:
    """Without the gap of a layer that was just being moved to new storage: as the scrape before found it."""
    if last is None or len(last.layers) != len(report.layers):
        return report
    return CacheReport(
        tuple(
            then if now.tokens_seen and not now.bytes_uncompressed else now
            for now, then in zip(report.layers, last.layers, strict=True)
        )
    )
