"""``CacheMonitor``: reports what compression does to a server's requests, as Prometheus metrics and log records."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from lagkv_ext.cache import CacheReport, LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.report import report_of
from lagkv_ext.serving.log import RequestRecord, log_request
from lagkv_ext.serving.monitor.families import KINDS, OUTCOMES, READS, CacheFamilies
from lagkv_ext.serving.monitor.registry import REGISTRY, child, join

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from lagkv_ext.serving.rollout import Decision

# Fields of a decision, by their names in the log record.
_DECIDED = ("request_id", "reason", "version", "eligible", "settings", "prompt_tokens")
_COMPRESSED = (LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache)
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Live:
    """Totals of the requests in flight."""

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

    cache: Callable[[], Cache | None]  #: a weak reference
    elsewhere: bool  #: an engine holds the cache, and nothing here can read it
    kind: str
    variant: str
    timer: CompressionTimer
    about: dict[str, Any]  #: for the log: the fields of the rollout's decision
    before: CacheReport | None = None
    begun: float = 0.0
    last: CacheReport | None = None  #: of the previous scrape


class _Series:
    """The series of the requests of one variant with one kind of cache."""

    def __init__(self, metrics: CacheFamilies, values: tuple[str, ...], variant: str, kind: str):
        both = (*values, variant, kind)
        self.requests = {x: child(metrics.requests, *both, x) for x in OUTCOMES}
        self.bytes = {x: child(metrics.bytes, *both, x) for x in ("held", "uncompressed")}
        shared = metrics.in_flight, metrics.duration, metrics.seen
        self.in_flight, self.duration, self.seen = (child(x, *both) for x in shared)
        compressing = metrics.kept, metrics.dropped, metrics.compressions, metrics.seconds
        self.kept, self.dropped, self.compressions, self.seconds = (
            child(x, *values, variant) for x in compressing
        )


class CacheMonitor:
    """Reports the caches of one model on a Prometheus registry.

    ::

        monitor = CacheMonitor(labels={"model": "llama-3.1-8b"})  # once, when the server starts
        with monitor.request(cache):  # around each request
            model.generate(**inputs, cache=cache)

    While a request is in flight, every scrape reads its cache where it stands, from the thread of the scrape: that
    takes nothing from the generating thread but its turn of the interpreter, never raises, and never keeps a cache
    alive. When it ends, counters and histograms take what it added, and one record is logged
    (``lagkv_ext.serving.log``). docs/operations.md explains every metric.

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
        # Requests that were dropped without an end. Filled by the garbage collector, which may run anywhere, even
        # while this thread holds a lock: so nothing but an append happens there.
        self._lost: deque[int] = deque()
        # Timers of ended requests with events that the device had not passed, and where their time belongs.
        self._late: list[tuple[CompressionTimer, _Series]] = []
        metrics, values = join(CacheFamilies, registry, labels)
        self._labels = dict(labels or {})
        self._make_series = functools.partial(_Series, metrics, values)
        self._series: dict[tuple[str, str], _Series] = {}
        # Made now, so that these series are there, at 0, before the first request. A variant's come with it.
        for kind in KINDS:
            self._series_of(kind, kind)
        self._reads = {x: child(metrics.reads, *values, x) for x in READS}
        metrics.admit(values, self)
        self._leave = functools.partial(metrics.leave, values, self)
        self._closed = False

    def close(self) -> None:
        """No more requests: another monitor may report under these labels, as that of a model that was loaded again.
        Counters stay and count on there. Requests in flight count when they finish, and are not read by scrapes."""
        self._forget_lost()
        self._closed = True
        self._leave()

    def request(self, cache: Cache | None, decision: Decision | None = None) -> MonitoredRequest:
        """Begins a request that uses ``cache``. Keep the returned object: as a context manager, or until you call its
        `MonitoredRequest.finish`.

        Any cache of transformers: the label "cache" is "lagkv" for those that LagKV compresses and "full" for all
        others. A cache may be used for one request after another: each counts what it added. ``decision``: of a
        `Rollout`, for the label "variant" and the log record; without one, "variant" is as "cache". ``None`` with a
        decision of `Rollout.route`: an engine holds the cache. Requests, outcomes and durations are counted, tokens and
        bytes are not.

        Raises:
            TypeError: no cache of transformers, or None without a decision.
            ValueError: the cache is in a request that has not ended.
            RuntimeError: the monitor is closed.
        """
        if self._closed:
            raise RuntimeError("request: this monitor is closed")
        elsewhere = cache is None and decision is not None
        if not isinstance(cache, Cache) and not elsewhere:
            raise TypeError(f"cache must be a cache of transformers, got {type(cache).__name__}")
        self._forget_lost()
        kind, timer = "full", CompressionTimer()
        if elsewhere and decision is not None and decision.compressed:
            kind = "lagkv"
        with self._lock:
            watched = not elsewhere and any(x.cache() is cache for x in self._flights.values())
            if watched or (isinstance(cache, _COMPRESSED) and cache.timer is not None):
                raise ValueError("cache must not be in a request that has not ended, got one that is")
            if isinstance(cache, _COMPRESSED):
                kind, cache.timer = "lagkv", timer
            self._number += 1
            number = self._number
            variant = kind if decision is None else decision.variant
            about = {name: getattr(decision, name, None) for name in _DECIDED}
            reference = _nothing if cache is None else weakref.ref(cache)
            flight = _Flight(reference, elsewhere, kind, variant, timer, about)
            self._flights[number] = flight
        if cache is not None:
            flight.before = self._report(cache)
        self._series_of(variant, kind).in_flight.inc()
        flight.begun = time.perf_counter()
        return MonitoredRequest(self, number)

    # -- at a scrape

    def read_live(self) -> dict[tuple[str, str], Live]:
        """Totals of the caches in flight, by variant and kind. Called by scrapes, from any thread; raises nothing."""
        self._forget_lost()
        with self._lock:
            flights = list(self._flights.values())
            live = {which: Live() for which in self._series}
        for flight in flights:
            cache = flight.cache()
            if cache is None:
                continue  # logged when the request ends
            report = self._report(cache, at_scrape=True)
            if report is not None:
                flight.last = _whole(report, flight.last)
                live.setdefault((flight.variant, flight.kind), Live()).add(flight.last)
        return live

    # -- when a request ends

    def finish(self, number: int, outcome: str) -> None:
        """For `MonitoredRequest`."""
        flight = self._end(number, outcome)
        duration = time.perf_counter() - flight.begun
        if outcome == "completed":
            self._series_of(flight.variant, flight.kind).duration.observe(duration)
        cache, after, seen = flight.cache(), None, None
        if flight.elsewhere:
            pass
        elif cache is None:
            self._reads["failed"].inc()
            _log.warning("a cache was deleted before its request ended: what it held is not counted")
        else:
            after = self._report(cache)
            if flight.before is not None and after is not None:
                seen = self._count(flight, flight.before, after)
        self._log(flight, outcome, duration, after, seen)

    def _log(
        self,
        flight: _Flight,
        outcome: str,
        duration: float | None = None,
        after: CacheReport | None = None,
        seen: float | None = None,
    ) -> None:
        log_request(
            RequestRecord(
                outcome=outcome,
                duration_s=duration,
                cache=flight.kind,
                variant=flight.variant,
                tokens_seen=None if seen is None else round(seen),
                tokens_kept=None if after is None else float(after.tokens_kept),
                bytes_held=None if after is None else after.bytes_held,
                bytes_saved=None if after is None else after.bytes_saved,
                compressions=None if after is None else after.compressions,
                labels=self._labels,
                **flight.about,
            )
        )

    def _series_of(self, variant: str, kind: str) -> _Series:
        with self._lock:
            if (variant, kind) not in self._series:
                self._series[variant, kind] = self._make_series(variant, kind)
            return self._series[variant, kind]

    def _count(self, flight: _Flight, before: CacheReport, after: CacheReport) -> float:
        """Counts what a request added; the tokens seen."""
        added = [now - then for now, then in zip(_growing(after), _growing(before), strict=True)]
        if min(added) < -0.5:  # it was reset since: as Prometheus does with a counter that starts again
            added = list(_growing(after))
        seen, dropped, compressions = (max(x, 0) for x in added)  # averages have rounding errors
        series = self._series_of(flight.variant, flight.kind)
        series.seen.inc(seen)
        series.bytes["held"].inc(after.bytes_held)
        series.bytes["uncompressed"].inc(after.bytes_uncompressed)
        if flight.kind == "lagkv":
            series.dropped.inc(dropped)
            series.compressions.inc(compressions)
            if after.tokens_seen:
                series.kept.observe(after.tokens_kept / after.tokens_seen)
        return seen

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
            self._log(flight, "abandoned")

    def _land(self, number: int) -> _Flight:
        """With the lock held: from here on the cache may be in another request."""
        flight = self._flights.pop(number)
        cache = flight.cache()
        if isinstance(cache, _COMPRESSED):
            cache.timer = None
        return flight

    def _count_end(self, flight: _Flight, outcome: str) -> None:
        series = self._series_of(flight.variant, flight.kind)
        series.in_flight.dec()
        series.requests[outcome].inc()
        self._count_seconds(flight.timer, series)

    def _count_seconds(self, timer: CompressionTimer, series: _Series) -> None:
        """Counts this timer, and earlier ones whose time is known only now."""
        with self._lock:
            timers, self._late = [*self._late, (timer, series)], []
            for late, where in timers:
                try:
                    where.seconds.inc(late.take())
                except Exception:  # of a device that failed: the request counts all the same
                    _log.warning("the time of compressions could not be read", exc_info=True)
                    continue
                if late.waits:
                    self._late.append((late, where))

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
    """Result of `CacheMonitor.request`. Leaving the ``with`` block ends the request: completed, "failed" where an
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


def _nothing() -> None:
    return None


def _growing(report: CacheReport) -> tuple[float, float, float]:
    """Numbers that only grow while a cache is used: tokens seen, tokens dropped, compressions."""
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
