"""``RolloutCollector``: exports the state of a rollout as Prometheus metrics."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import Counter
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from lagkv_ext.serving.monitor.registry import REGISTRY, Families, child, join

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from lagkv_ext.serving.rollout.status import RolloutStatus

_log = logging.getLogger(__name__)


class HasStatus(Protocol):
    def status(self) -> RolloutStatus: ...


# Metrics of a rollout: field of its status, name, help.
_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("version", "lagkv_rollout_version", "Version of the rollout file in force."),
    ("enabled", "lagkv_rollout_enabled", "1 where the rollout file allows compression."),
    (
        "unusable",
        "lagkv_rollout_file_unusable",
        "1 where the rollout file or the record of a trip cannot be used.",
    ),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("check_errors", "lagkv_rollout_check_errors", "Quality checks that failed."),
    (
        "failures",
        "lagkv_rollout_failures",
        "Requests that failed with a compressed cache, as the server reported.",
    ),
    ("reload_errors", "lagkv_rollout_reload_errors", "Contents of the rollout file that could not be used."),
)
# Metrics of each variant.
_VARIANT_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("share", "lagkv_rollout_share_ratio", "Share of requests that the rollout file gives to a variant."),
    ("tripped", "lagkv_rollout_tripped", "1 where a variant has tripped: its requests get the full cache."),
    (
        "agreement",
        "lagkv_rollout_agreement_ratio",
        "Share of tokens on which compressed and full cache agree, mean of the last checks.",
    ),
    (
        "agreement_at_least",
        "lagkv_rollout_agreement_at_least_ratio",
        "Lower bound of the mean agreement, valid at every moment.",
    ),
    (
        "agreement_at_most",
        "lagkv_rollout_agreement_at_most_ratio",
        "Upper bound of the mean agreement, valid at every moment.",
    ),
    ("kl", "lagkv_rollout_kl_nats", "Divergence of the compressed cache from the full one, nats per token."),
    ("rung", "lagkv_rollout_ladder_rung", "Rung of the ladder; 0 is the largest cache."),
    ("samples", "lagkv_rollout_samples", "Answers stored for review."),
)


class RolloutFamilies(Families):
    """The metrics of all `RolloutCollector` on one registry."""

    title = "RolloutCollector"

    def __init__(self, names: tuple[str, ...]):
        super().__init__(names)
        self.errors = Counter(
            "lagkv_rollout_read_errors", "Scrapes at which a rollout could not be read.", names, registry=None
        )

    def families(self, members: list[tuple[tuple[str, ...], Any]]) -> Iterator[Metric]:
        names = list(self.label_names)
        by_variant = [*names, "variant"]
        families: dict[str, Any] = {
            **{field: GaugeMetricFamily(name, text, labels=names) for field, name, text in _GAUGES},
            **{field: CounterMetricFamily(name, text, labels=names) for field, name, text in _COUNTERS},
            **{
                field: GaugeMetricFamily(name, text, labels=by_variant)
                for field, name, text in _VARIANT_GAUGES
            },
            "checks": CounterMetricFamily(
                "lagkv_rollout_checks", "Quality checks that came to a result.", labels=by_variant
            ),
            "decisions": CounterMetricFamily(
                "lagkv_rollout_decisions",
                "Requests by what was decided for them.",
                labels=[*by_variant, "reason"],
            ),
            "reviews": GaugeMetricFamily(
                "lagkv_rollout_reviews",
                "Verdicts of people on stored answers.",
                labels=[*by_variant, "verdict"],
            ),
        }
        for values, collector in members:
            for field, labels, number in collector.read():
                families[field].add_metric([*values, *labels], number)
        yield from families.values()


class RolloutCollector:
    """Exports ``rollout.status()`` at every scrape.

    Args:
        rollout: a ``lagkv_ext.serving.rollout.Rollout``, or anything whose ``status()`` has its fields. Kept alive.
        registry, labels: as for `CacheMonitor`.

    Before the first quality check of a variant its agreement and divergence are absent. A status that cannot be read is
    counted in ``lagkv_rollout_read_errors_total`` and logged; the scrape goes on without it.

    Raises:
        TypeError, ValueError: as for `CacheMonitor`; a ``rollout`` without ``status()``.
    """

    def __init__(
        self,
        rollout: HasStatus,
        registry: CollectorRegistry = REGISTRY,
        labels: Mapping[str, str] | None = None,
    ):
        if not callable(getattr(rollout, "status", None)):
            raise TypeError(f"rollout must have a method status(), got {type(rollout).__name__}")
        self._rollout = rollout
        metrics, values = join(RolloutFamilies, registry, labels)
        self._errors = child(metrics.errors, *values)
        metrics.admit(values, self)
        self._leave = functools.partial(metrics.leave, values, self)

    def close(self) -> None:
        """From now on scrapes do not read the rollout, and another may report under these labels."""
        self._leave()

    def read(self) -> list[tuple[str, tuple[str, ...], float]]:
        """Field, further label values and number of each sample. Called by scrapes; raises nothing."""
        try:
            return list(_samples(self._rollout.status()))
        except Exception:
            self._errors.inc()
            _log.warning("a rollout could not be read for its metrics", exc_info=True)
            return []


def _samples(status: RolloutStatus) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for field, _, _ in (*_GAUGES, *_COUNTERS):
        yield field, (), float(getattr(status, field))
    for name, variant in status.variants.items():
        for field, _, _ in _VARIANT_GAUGES:
            if (value := getattr(variant, field)) is not None:
                yield field, (name,), float(value)
        yield "checks", (name,), float(variant.checks)
        for reason, count in variant.decisions.items():
            yield "decisions", (name, str(reason)), float(count)
        for verdict, count in variant.reviews.items():
            yield "reviews", (name, str(verdict)), float(count)
