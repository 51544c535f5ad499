"""A monitor reports on its registry, whatever others register and unregister there."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")

import prometheus_client
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from lagkv_ext.serving.monitor import CacheMonitor, RolloutCollector
from tests.serving.monitor_cases import Rolled, cache, fill, value, values

MODELS = ("a", "b")
#: On one of two registries: a monitor starts, a request ends, collectors go and come back.
ACTIONS = st.tuples(
    st.sampled_from(["monitor", "request", "empty", "restore", "foreign"]),
    st.integers(0, 1),
    st.sampled_from(MODELS),
)


class Registry:
    """A registry, and beside it what it has to export."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.monitors: dict[str, CacheMonitor] = {}  # that the registry exports
        self.counts: dict[str, int] = {}
        self.gone: list = []  # collectors that were unregistered, while no others took their place

    def monitor(self, model):
        foreign = [x for x in self.registry._collector_to_names if isinstance(x, prometheus_client.Counter)]
        if foreign:
            with pytest.raises(ValueError, match="registry must not have metrics named as those"):
                CacheMonitor(self.registry, {"model": model})
        elif model in self.monitors:
            with pytest.raises(ValueError, match="registry already has a CacheMonitor with labels"):
                CacheMonitor(self.registry, {"model": model})
        else:
            self.monitors[model] = CacheMonitor(self.registry, {"model": model})
            self.counts[model] = 0
            self.gone = []

    def request(self, model):
        if model in self.monitors:
            held = cache()
            with self.monitors[model].request(held):
                fill(held, 30)
            self.counts[model] += 30

    def empty(self, _):
        """As test suites do, and applications that are made again."""
        collectors = list(self.registry._collector_to_names)
        for collector in collectors:
            self.registry.unregister(collector)
        if self.monitors:
            self.gone = [(collectors, self.monitors, self.counts)]
        self.monitors, self.counts = {}, {}

    def restore(self, _):
        if self.gone and not self.registry._collector_to_names:
            collectors, self.monitors, self.counts = self.gone.pop()
            for collector in collectors:
                self.registry.register(collector)

    def foreign(self, _):
        if not self.registry._collector_to_names:
            prometheus_client.Counter("lagkv_tokens_seen", "Of somebody else.", registry=self.registry)

    def check(self):
        seen = {
            dict(labels)["model"]: count
            for (name, labels), count in values(self.registry).items()
            if name == "lagkv_tokens_seen_total" and ("cache", "lagkv") in labels
        }
        assert seen == self.counts


@given(st.lists(ACTIONS, max_size=20))
@example([("monitor", 0, "a"), ("empty", 0, "a"), ("monitor", 0, "b"), ("request", 0, "b")])
@example(
    [("monitor", 0, "a"), ("empty", 0, "a"), ("restore", 0, "a"), ("monitor", 0, "b"), ("request", 0, "a")]
)
@example([("monitor", 0, "a"), ("empty", 0, "a"), ("foreign", 0, "a"), ("monitor", 0, "a")])
@example([("monitor", 0, "a"), ("monitor", 1, "b"), ("empty", 0, "a"), ("request", 1, "b")])
def test_a_registry_exports_the_monitors_made_since_it_was_emptied(actions):
    registries = Registry(), Registry()
    for action, which, model in actions:
        getattr(registries[which], action)(model)
        for registry in registries:
            registry.check()


def test_the_metrics_of_a_kind_come_and_go_together():
    """One collector: nobody can unregister a part, and leave monitors that report the rest."""
    registry = CollectorRegistry()
    CacheMonitor(registry)
    RolloutCollector(Rolled(), registry)
    assert len(registry._collector_to_names) == 2


def test_a_new_monitor_reads_no_cache_of_others():
    """Asking whether a registry still has the collector is no scrape."""
    registry = CollectorRegistry()
    first = CacheMonitor(registry, {"model": "a"})
    held = cache()
    with first.request(held):
        CacheMonitor(registry, {"model": "b"})
    assert value(registry, "lagkv_cache_reads_total", model="a", outcome="read") == 2  # its begin and its end


def test_one_metric_alone_can_be_asked_for():
    """`/metrics?name[]=` collects a restricted registry."""
    registry = CollectorRegistry()
    CacheMonitor(registry)
    found = list(registry.restricted_registry(["lagkv_requests_in_flight"]).collect())
    assert [x.name for x in found] == ["lagkv_requests_in_flight"]
