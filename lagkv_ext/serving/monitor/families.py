"""The metrics of `CacheMonitor`: names, help texts, labels, buckets. docs/operations.md explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from lagkv_ext.serving.monitor.registry import Families

KINDS = ("lagkv", "full")  #: of caches: those that LagKV compresses, and all others
OUTCOMES = ("completed", "failed", "cancelled", "abandoned")
READS = ("read", "skipped", "failed")
_KEPT = (0.05, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)


class CacheFamilies(Families):
    """The metrics of all `CacheMonitor` on one registry."""

    title = "CacheMonitor"

    def __init__(self, names: tuple[str, ...]):
        super().__init__(names)
        by_variant = (*names, "variant")
        by_kind = (*by_variant, "cache")
        self.requests = Counter(
            "lagkv_requests", "Requests that ended, by outcome.", (*by_kind, "outcome"), registry=None
        )
        # "livesum": in a server of several processes the sum over those alive.
        self.in_flight = Gauge(
            "lagkv_requests_in_flight",
            "Requests that have begun and not ended.",
            by_kind,
            registry=None,
            multiprocess_mode="livesum",
        )
        self.duration = Histogram(
            "lagkv_request_duration_seconds",
            "Wall time of completed requests.",
            by_kind,
            registry=None,
            buckets=_SECONDS,
        )
        self.seen = Counter("lagkv_tokens_seen", "Tokens given to caches.", by_kind, registry=None)
        self.bytes = Counter(
            "lagkv_request_cache_bytes",
            "Bytes at the end of requests: really held, and those of the keys and values of all tokens seen.",
            (*by_kind, "state"),
            registry=None,
        )
        self.kept = Histogram(
            "lagkv_request_kept_ratio",
            "Share of the tokens seen that a full-attention layer of a LagKV cache held when a request ended.",
            by_variant,
            registry=None,
            buckets=_KEPT,
        )
        self.dropped = Counter(
            "lagkv_tokens_dropped",
            "Tokens dropped by compression, on average over the full-attention layers.",
            by_variant,
            registry=None,
        )
        self.compressions = Counter(
            "lagkv_compressions", "Compressions, each layer counted.", by_variant, registry=None
        )
        self.seconds = Counter(
            "lagkv_compression_seconds", "Time in the operators that compress.", by_variant, registry=None
        )
        self.reads = Counter(
            "lagkv_cache_reads",
            "Readings of caches at scrapes and when requests begin and end, by outcome.",
            (*names, "outcome"),
            registry=None,
        )

    def families(self, members: list[tuple[tuple[str, ...], Any]]) -> Iterator[Metric]:
        tokens = GaugeMetricFamily(
            "lagkv_cache_tokens",
            "Tokens of the requests in flight: seen, and kept on average over the full-attention layers.",
            labels=[*self.label_names, "variant", "cache", "state"],
        )
        size = GaugeMetricFamily(
            "lagkv_cache_bytes",
            "Bytes of the caches in flight: really held, and those of the keys and values of all tokens seen.",
            labels=[*self.label_names, "variant", "cache", "state"],
        )
        for values, monitor in members:
            for which, live in monitor.read_live().items():
                tokens.add_metric([*values, *which, "seen"], live.seen)
                tokens.add_metric([*values, *which, "kept"], live.kept)
                size.add_metric([*values, *which, "held"], live.held)
                size.add_metric([*values, *which, "uncompressed"], live.uncompressed)
        yield tokens
        yield size
