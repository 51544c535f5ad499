"""RolloutCollector: what a rollout says of itself is what is exported, at every scrape."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from lagkv_ext.serving.monitor import CacheMonitor, RolloutCollector
from lagkv_ext.serving.rollout import RolloutStatus, VariantStatus
from lagkv_ext.serving.rollout.status import REASONS
from tests.serving.monitor_cases import Rolled, value, values

COUNTS = st.integers(0, 10**9)
SHARES = st.floats(0, 1)
VARIANTS = st.builds(
    VariantStatus,
    share=SHARES,
    tripped=st.booleans(),
    decisions=st.fixed_dictionaries(dict.fromkeys(REASONS, COUNTS)),
    checks=COUNTS,
    agreement=st.none() | SHARES,
    agreement_at_least=st.none() | SHARES,
    agreement_at_most=st.none() | SHARES,
    kl=st.none() | st.floats(min_value=0),
    rung=st.none() | COUNTS,
    samples=COUNTS,
    reviews=st.dictionaries(st.sampled_from(["full", "compressed", "same"]), COUNTS),
)
STATUSES = st.builds(
    RolloutStatus,
    version=COUNTS,
    enabled=st.booleans(),
    variants=st.dictionaries(st.sampled_from(["lagkv", "eighth", "full"]), VARIANTS, min_size=1),
    check_errors=COUNTS,
    failures=COUNTS,
    unusable=st.booleans(),
    reload_errors=COUNTS,
)
NAMES = {
    "version": "lagkv_rollout_version",
    "enabled": "lagkv_rollout_enabled",
    "check_errors": "lagkv_rollout_check_errors_total",
    "failures": "lagkv_rollout_failures_total",
    "unusable": "lagkv_rollout_file_unusable",
    "reload_errors": "lagkv_rollout_reload_errors_total",
}
VARIANT_NAMES = {
    "share": "lagkv_rollout_share_ratio",
    "tripped": "lagkv_rollout_tripped",
    "checks": "lagkv_rollout_checks_total",
    "agreement": "lagkv_rollout_agreement_ratio",
    "agreement_at_least": "lagkv_rollout_agreement_at_least_ratio",
    "agreement_at_most": "lagkv_rollout_agreement_at_most_ratio",
    "kl": "lagkv_rollout_kl_nats",
    "rung": "lagkv_rollout_ladder_rung",
    "samples": "lagkv_rollout_samples",
}


@given(st.lists(STATUSES, min_size=1, max_size=4))
def test_every_scrape_shows_the_status(statuses):
    """All of it and nothing else; what is not known yet is absent."""
    registry = CollectorRegistry()
    rolled = Rolled()
    RolloutCollector(rolled, registry, {"model": "m"})
    at = ("model", "m")
    for status in statuses:
        rolled.found = status
        expected = {(name, (at,)): float(getattr(status, field)) for field, name in NAMES.items()}
        for which, variant in status.variants.items():
            of = ("variant", which)
            expected |= {
                (name, (at, of)): float(found)
                for field, name in VARIANT_NAMES.items()
                if (found := getattr(variant, field)) is not None
            }
            expected |= {
                ("lagkv_rollout_decisions_total", (at, ("reason", reason), of)): float(count)
                for reason, count in variant.decisions.items()
            }
            expected |= {
                ("lagkv_rollout_reviews", (at, of, ("verdict", verdict))): float(count)
                for verdict, count in variant.reviews.items()
            }
        expected["lagkv_rollout_read_errors_total", (at,)] = 0.0
        assert values(registry) == expected


def test_every_field_is_exported():
    assert {field.name for field in dataclasses.fields(RolloutStatus)} == {*NAMES, "variants"}
    assert {field.name for field in dataclasses.fields(VariantStatus)} == {
        *VARIANT_NAMES,
        "decisions",
        "reviews",
    }


def test_a_status_that_cannot_be_read_is_counted_and_costs_no_scrape(caplog):
    registry = CollectorRegistry()
    good, bad = Rolled(), Rolled()
    RolloutCollector(good, registry, {"model": "good"})
    RolloutCollector(bad, registry, {"model": "bad"})
    bad.found = None
    found = values(registry)
    assert found["lagkv_rollout_version", (("model", "good"),)] == 7
    assert ("lagkv_rollout_version", (("model", "bad"),)) not in found
    assert found["lagkv_rollout_read_errors_total", (("model", "bad"),)] == 1
    assert found["lagkv_rollout_read_errors_total", (("model", "good"),)] == 0
    assert "a rollout could not be read" in caplog.text


def test_beside_a_monitor_on_one_registry():
    registry = CollectorRegistry()
    CacheMonitor(registry, {"model": "m"})
    RolloutCollector(Rolled(), registry, {"model": "m"})
    assert value(registry, "lagkv_rollout_enabled", model="m") == 1
    assert value(registry, "lagkv_requests_in_flight", cache="full", model="m") == 0


def test_a_closed_collector_leaves_its_labels_to_the_next():
    registry = CollectorRegistry()
    first = RolloutCollector(Rolled(), registry, {"model": "m"})
    first.close()
    assert not [name for name, _ in values(registry) if name == "lagkv_rollout_version"]
    rolled = Rolled()
    rolled.found = dataclasses.replace(rolled.found, version=8)
    RolloutCollector(rolled, registry, {"model": "m"})
    first.close()
    assert value(registry, "lagkv_rollout_version", model="m") == 8


def test_what_cannot_be():
    registry = CollectorRegistry()
    with pytest.raises(TypeError, match=r"rollout must have a method status\(\), got RolloutStatus"):
        RolloutCollector(Rolled().status(), registry)
    RolloutCollector(Rolled(), registry)
    with pytest.raises(ValueError, match="registry already has a RolloutCollector with labels"):
        RolloutCollector(Rolled(), registry)
