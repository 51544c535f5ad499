"""``RolloutCollector``: the state of a rollout in Prometheus metrics."""

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


# name, help, of a status
_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("version", "lagkv_rollout_version", "Version of the rollout file in force."),
    ("enabled", "lagkv_rollout_enabled", "1 where the rollout file allows compression."),
    ("share", "lagkv_rollout_share_ratio", "Share of requests that the rollout file asks to compress."),
    ("tripped", "lagkv_rollout_tripped", "1 where quality checks have switched compression off."),
    (
        "unusable",
        "lagkv_rollout_file_unusable",
        "1 where the rollout file or the record of a trip cannot be used.",
    ),
    (
        "agreement",
        "lagkv_rollout_agreement_ratio",
        "Share of tokens on which compressed and full cache agree.",
    ),
    ("kl", "lagkv_rollout_kl_nats", "Divergence of the compressed cache from the full one, nats per token."),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("checks", "lagkv_rollout_checks", "Quality checks that came to a result."),
    ("check_errors", "lagkv_rollout_check_errors", "Quality checks that failed."),
    (
        "failures",
        "lagkv_rollout_failures",
        "Requests that failed with a compressed cache, as the server said.",
    ),
    ("reload_errors", "lagkv_rollout_reload_errors", "Contents of the rollout file that could not be used."),
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
        families: dict[str, Any] = {
            **{field: GaugeMetricFamily(name, text, labels=names) for field, name, text in _GAUGES},
            **{field: CounterMetricFamily(name, text, labels=names) for field, name, text in _COUNTERS},
        }
        decisions = CounterMetricFamily(
            "lagkv_rollout_decisions", "Requests by what was decided for them.", labels=[*names, "reason"]
        )
        for values, collector in members:
            found = collector.read()
            if found is None:
                continue
            numbers, reasons = found
            for field, number in numbers.items():
                if number is not None:
                    families[field].add_metric(list(values), number)
            for reason, count in reasons.items():
                decisions.add_metric([*values, reason], count)
        yield from (*families.values(), decisions)


class RolloutCollector:
    """Exports ``rollout.status()`` at every scrape.

    Args:
        rollout: a ``lagkv_ext.serving.rollout.Rollout``, or anything whose ``status()`` has these fields. Kept alive.
        registry, labels: as for `CacheMonitor`.

    Before the first quality check there is no agreement and no divergence to export. A status that cannot be read is
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

    def read(self) -> tuple[dict[str, float | None], dict[str, int]] | None:
        """Numbers by field and decisions by reason. Called by scrapes; raises nothing."""
        try:
            status = self._rollout.status()
            fields = [field for field, _, _ in (*_GAUGES, *_COUNTERS)]
            values = {field: getattr(status, field) for field in fields}
            numbers = {field: None if x is None else float(x) for field, x in values.items()}
            return numbers, {str(reason): int(count) for reason, count in status.decisions.items()}
        except Exception:
            self._errors.inc()
            _log.warning("a rollout could not be read for its metrics", exc_info=True)
            return None
