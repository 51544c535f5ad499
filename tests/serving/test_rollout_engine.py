"""``Rollout`` for an engine that holds the caches itself: it decides, judges and stores what the engine measured."""

from __future__ import annotations

import dataclasses
import logging

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("prometheus_client", reason="the monitor needs prometheus_client")

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from lagkv_ext.serving.monitor import CacheMonitor
from lagkv_ext.serving.rollout import Check, Guard, Rollout, Samples
from lagkv_ext.serving.rollout.policy import FULL, MAIN
from lagkv_ext.serving.rollout.samples import SampleFolder
from tests.cache.models import tiny_config
from tests.serving.rollout_cases import policy, stored

CONFIG = tiny_config("llama")
GOOD, BAD = (Check(agreement=x, kl=0.0, tokens=20, prompt_tokens=1000) for x in (1.0, 0.2))


def rollout_of(folder, **changes) -> Rollout:
    return Rollout(stored(folder, policy(**changes)).path, CONFIG, reload_s=0)


@given(
    st.lists(st.tuples(st.text(max_size=9), st.integers(0, 200)), min_size=1, max_size=20), st.floats(0, 1)
)
def test_routes_as_it_gives_caches(tmp_path_factory, requests, share):
    rollout = rollout_of(tmp_path_factory.mktemp("rollout"), share=share, min_prompt_tokens=100)
    for request_id, tokens in requests:
        route = rollout.route(request_id=request_id, prompt_tokens=tokens)
        decision = rollout.cache(request_id=request_id, prompt_tokens=tokens)
        assert route == dataclasses.replace(decision, cache=None)
        assert (route.settings is not None) == route.compressed == (route.reason == "compressed")
    counted = [sum(x.decisions.values()) for x in rollout.status().variants.values()]
    assert sum(counted) == 2 * len(requests)


def test_a_wrong_argument_gives_the_full_cache(tmp_path, caplog):
    rollout = rollout_of(tmp_path)
    decision = rollout.route(request_id="a", prompt_tokens="many")  # type: ignore[arg-type]
    assert (decision.cache, decision.compressed, decision.reason) == (None, False, "error")
    assert "it gets the full one" in caplog.text


def test_checks_of_an_engine_trip_the_guard(tmp_path):
    rollout = rollout_of(tmp_path, guard=Guard(min_agreement=0.9, check_share=1.0))
    assert not rollout.add_check(BAD, version=2, variant=MAIN)  # of another version
    assert not rollout.add_check(BAD, version=1, variant="other")
    assert not rollout.add_check(dataclasses.replace(BAD, compressed=False), version=1, variant=MAIN)
    assert rollout.status().variants[MAIN].checks == 0
    with pytest.raises(TypeError, match="check must be a Check, got float"):
        rollout.add_check(0.5, version=1, variant=MAIN)  # type: ignore[arg-type]
    assert rollout.add_check(GOOD, version=1, variant=MAIN)
    for _ in range(40):
        if not rollout.add_check(BAD, version=1, variant=MAIN):
            break
    status = rollout.status().variants[MAIN]
    assert status.tripped
    assert status.checks < 40  # after a trip without recovery checks count no more
    decision = rollout.route(request_id="a", prompt_tokens=1000)
    assert (decision.compressed, decision.reason, decision.wants_check) == (False, "tripped", False)
    assert Rollout(tmp_path / "lagkv-rollout.json", CONFIG).status().variants[MAIN].tripped  # others see it


def test_checks_after_a_trip_let_a_variant_come_back(tmp_path):
    guard = Guard(min_agreement=0.5, max_kl=1.0, level=0.2, check_share=1.0, recover=True)
    rollout = rollout_of(tmp_path, guard=guard)
    while not rollout.status().variants[MAIN].tripped:
        assert rollout.add_check(BAD, version=1, variant=MAIN)
    for _ in range(400):
        assert rollout.route(request_id="a", prompt_tokens=1000).wants_check
        if not rollout.add_check(GOOD, version=1, variant=MAIN):
            break
    assert rollout.status().version == 2
    assert rollout.route(request_id="a", prompt_tokens=1000).compressed


def test_samples_of_an_engine_are_redacted_and_bounded(tmp_path, caplog):
    made = policy(samples=Samples(share=1.0, max=2, folder="samples"))
    store = stored(tmp_path, made)
    rollout = Rollout(store.path, CONFIG, redact=lambda text: text.replace("secret", "[...]"), reload_s=0)
    decision = rollout.route(request_id="a", prompt_tokens=100)
    assert decision.wants_sample
    about = {"prompt_tokens": 100, "version": decision.version, "variant": decision.variant}
    assert rollout.add_sample("a secret", "secret one", "two", **about)
    assert not rollout.add_sample("a", "b", None, **about)  # type: ignore[arg-type]
    assert rollout.add_sample("a", "b", "c", **about)
    assert not rollout.add_sample("a", "b", "c", **about)  # two are enough
    folder = SampleFolder(store, made.samples)
    first = folder.read(folder.names()[0])
    assert (first.prompt, first.full, first.compressed, first.prompt_tokens) == (
        "a [...]",
        "[...] one",
        "two",
        100,
    )
    assert len(folder.names()) == 2
    assert "a sample could not be made" in caplog.text


def test_the_monitor_counts_requests_whose_cache_an_engine_holds(tmp_path, caplog):
    rollout, registry = rollout_of(tmp_path, share=0.5), CollectorRegistry()
    monitor = CacheMonitor(registry)
    decisions = [rollout.route(request_id=f"user-{i}", prompt_tokens=100) for i in range(20)]
    with caplog.at_level(logging.INFO, logger="lagkv_ext.requests"):
        for decision in decisions:
            with monitor.request(None, decision):
                pass
    compressed = sum(x.compressed for x in decisions)
    assert 0 < compressed < 20
    for cache, variant, count in (("lagkv", MAIN, compressed), ("full", FULL, 20 - compressed)):
        labels = {"cache": cache, "variant": variant}
        assert registry.get_sample_value("lagkv_requests_total", {**labels, "outcome": "completed"}) == count
        assert registry.get_sample_value("lagkv_request_duration_seconds_count", labels) == count
        assert registry.get_sample_value("lagkv_requests_in_flight", labels) == 0
        assert registry.get_sample_value("lagkv_tokens_seen_total", labels) == 0
    assert registry.get_sample_value("lagkv_cache_reads_total", {"outcome": "failed"}) == 0
    records = [x.lagkv for x in caplog.records if hasattr(x, "lagkv")]
    assert len(records) == 20
    assert all(x["tokens_seen"] is x["bytes_held"] is None and x["duration_s"] >= 0 for x in records)
    with pytest.raises(TypeError, match="cache must be a cache of transformers, got NoneType"):
        monitor.request(None)
