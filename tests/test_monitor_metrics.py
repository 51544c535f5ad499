"""CacheMonitor: counters are the sums of what reports say, whatever happens in which order."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")

import prometheus_client
import torch
from cache_models import SMALL, generate, prompt, tiny_config, tiny_model
from family_models import encoder_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from monitor_cases import cache, fill, value, values
from padded_models import padded, texts
from prometheus_client import CollectorRegistry
from transformers import DynamicCache

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache
from lagkv_ext.monitor import CacheMonitor

CACHES = 2
ACTIONS = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, CACHES - 1)),
    st.tuples(st.just("fill"), st.integers(0, CACHES - 1), st.integers(1, 60)),
    st.tuples(
        st.just("finish"), st.integers(0, CACHES - 1), st.sampled_from(["completed", "failed", "cancelled"])
    ),
    st.tuples(st.just("lose"), st.integers(0, CACHES - 1)),
    st.tuples(st.just("reset"), st.integers(0, CACHES - 1)),
    st.tuples(st.just("scrape")),
)


@settings(deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.sampled_from(["llama", "gemma3"]))
def test_counters_are_sums_of_reports(actions, kind):
    """Requests begin, go on and end in any order on caches that are used again and reset between requests."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry, {"model": kind})
    caches = [cache(kind) for _ in range(CACHES)]
    requests, before = {}, {}
    expected: Counter = Counter()
    for action, *arguments in actions:
        i = arguments[0] if arguments else 0
        if action == "begin" and i not in requests:
            before[i], requests[i] = caches[i].report(), monitor.request(caches[i])
        elif action == "fill":
            fill(caches[i], arguments[1])
        elif action == "reset" and i not in requests:
            caches[i].reset()
        elif action == "finish" and i in requests:
            requests.pop(i).finish(arguments[1])
            then, now = before[i], caches[i].report()
            expected[arguments[1]] += 1
            expected["seen"] += now.tokens_seen - then.tokens_seen
            expected["dropped"] += now.tokens_seen - now.tokens_kept - (then.tokens_seen - then.tokens_kept)
            expected["compressions"] += now.compressions - then.compressions
            expected["held"] += now.bytes_held
            expected["uncompressed"] += now.bytes_uncompressed
            expected["with tokens"] += now.tokens_seen > 0
        elif action == "lose" and i in requests:
            del requests[i]
            expected["abandoned"] += 1
        elif action == "scrape":
            check(registry, kind, caches, requests, expected)
    check(registry, kind, caches, requests, expected)


def check(registry, kind, caches, requests, expected):
    found = values(registry)
    at = {"model": kind}

    def one(name, **labels):
        return found[name, tuple(sorted({**at, **labels}.items()))]

    live = [caches[i].report() for i in requests]
    for outcome in ("completed", "failed", "cancelled", "abandoned"):
        assert one("lagkv_requests_total", outcome=outcome) == expected[outcome]
    assert one("lagkv_requests_in_flight") == len(live)
    assert one("lagkv_request_duration_seconds_count") == expected["completed"]
    assert one("lagkv_request_kept_ratio_count") == expected["with tokens"]
    assert one("lagkv_tokens_seen_total") == expected["seen"]
    assert one("lagkv_tokens_dropped_total") == pytest.approx(expected["dropped"])
    assert one("lagkv_compressions_total") == expected["compressions"]
    assert (one("lagkv_compression_seconds_total") > 0) >= (expected["compressions"] > 0)
    assert one("lagkv_cache_tokens", state="seen") == sum(x.tokens_seen for x in live)
    assert one("lagkv_cache_tokens", state="kept") == pytest.approx(sum(x.tokens_kept for x in live))
    for state, name in (("held", "bytes_held"), ("uncompressed", "bytes_uncompressed")):
        assert one("lagkv_cache_bytes", state=state) == sum(getattr(x, name) for x in live)
        assert one("lagkv_request_cache_bytes_total", state=state) == expected[state]
    assert one("lagkv_cache_reads_total", outcome="failed") == 0


def padded_batch():
    model = tiny_model("llama")
    ids, mask = padded(texts([50, 20]))
    held = LagKVCache(model.config, **SMALL)
    return held, lambda: generate(model, ids, held, attention_mask=mask)


def quantized():
    model = tiny_model("llama")
    held = LagKVCache(model.config, quantization="int8", **SMALL)
    return held, lambda: generate(model, prompt(60), held)


def static():
    model = tiny_model("llama")
    held = LagKVStaticCache(model.config, capacity=32, keep=2, **SMALL)
    return held, lambda: generate(model, prompt(60), held, disable_compile=True)


def translation():
    model = encoder_decoder("BART")
    held = LagKVEncoderDecoderCache(model.config, **SMALL)
    return held, lambda: generate(model, prompt(20), held, new=60, min_new_tokens=60, num_beams=1)


@pytest.mark.parametrize("make", [padded_batch, quantized, static, translation], ids=lambda x: x.__name__)
def test_every_cache(make):
    """Read live in the middle, and counted at the end, with the time of its compressions."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held, run = make()
    with monitor.request(held):
        run()
        report = held.report()
        assert value(registry, "lagkv_cache_tokens", state="seen") == report.tokens_seen
        assert value(registry, "lagkv_cache_bytes", state="held") == report.bytes_held
    assert value(registry, "lagkv_tokens_seen_total") == report.tokens_seen > 0
    assert value(registry, "lagkv_compressions_total") == report.compressions > 0
    assert value(registry, "lagkv_compression_seconds_total") > 0
    assert value(registry, "lagkv_cache_reads_total", outcome="failed") == 0
    assert held.timer is None


def test_outcomes_of_the_block():
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), monitor.request(cache()):
            raise error
    with monitor.request(cache()) as request:
        request.finish()  # earlier than the block
    found = {
        x: value(registry, "lagkv_requests_total", outcome=x) for x in ("failed", "cancelled", "completed")
    }
    assert found == {"failed": 1, "cancelled": 1, "completed": 1}


def test_no_cache_is_kept_alive():
    """Neither by a request in flight nor by a scrape of it: without the garbage collector, by its references alone."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held = cache()
    alive = weakref.ref(held)
    request = monitor.request(held)
    fill(held, 50)
    assert value(registry, "lagkv_cache_tokens", state="seen") == 50
    gc.disable()
    try:
        del held
        assert alive() is None
    finally:
        gc.enable()
    assert value(registry, "lagkv_cache_tokens", state="seen") == 0
    request.finish()
    assert value(registry, "lagkv_requests_in_flight") == 0
    assert (
        value(registry, "lagkv_cache_reads_total", outcome="failed") == 1
    )  # its totals are lost, and it is said


def test_a_cache_that_cannot_be_read_is_counted_and_harms_nothing(caplog):
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    broken, whole = cache(), cache()
    with monitor.request(broken), monitor.request(whole):
        fill(whole, 40)
        del broken.layers[1]._track
        assert value(registry, "lagkv_cache_tokens", state="seen") == 40
        assert value(registry, "lagkv_cache_reads_total", outcome="failed") == 2  # by both scrapes
        assert "a cache could not be read" in caplog.text
    assert value(registry, "lagkv_requests_total", outcome="completed") == 2
    assert value(registry, "lagkv_tokens_seen_total") == 40


def test_the_timer_follows_the_cache_and_leaves_with_the_request():
    """Through padding and reset, which replace layers, but not into a copy."""
    monitor = CacheMonitor(CollectorRegistry())
    held = cache()
    with monitor.request(held):
        timer = held.timer
        held.set_attention_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
        assert {layer.timer for layer in held.layers} == {timer}
        held.reset()
        assert {layer.timer for layer in held.layers} == {timer}
        assert held.copy().timer is None
    assert {layer.timer for layer in held.layers} == {None}


def test_a_compiled_step_is_watched_without_a_new_graph():
    """One graph, whether the cache is in a request or not."""
    torch._dynamo.reset()
    held = LagKVStaticCache(
        tiny_config("llama"), capacity=32, keep=2, max_batch_size=1, dtype=torch.float32, **SMALL
    )
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=counting, fullgraph=True)
    def step(key, value):
        return held.update(key, value, 0)

    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    with torch.no_grad():
        step(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))
        before = len(graphs)
        with monitor.request(held):
            for _ in range(60):
                step(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))
                assert value(registry, "lagkv_cache_reads_total", outcome="failed") == 0
    assert len(graphs) == before == 1
    assert value(registry, "lagkv_compressions_total") > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_time_on_a_device_is_read_without_waiting():
    from lagkv_ext.cache.timer import CompressionTimer

    timer = CompressionTimer()
    x = torch.randn(1024, 1024, device="cuda")
    with timer.timing(x.device):
        x = x @ x
    torch.cuda.synchronize()
    assert timer.waits
    assert timer.take() > 0
    assert not timer.waits
    assert timer.take() == 0


# -- bad input


def test_requests_that_cannot_be():
    monitor = CacheMonitor(CollectorRegistry())
    with pytest.raises(TypeError, match=r"cache must be one of LagKVCache, .*, got DynamicCache"):
        monitor.request(DynamicCache())
    held = cache()
    request = monitor.request(held)
    with pytest.raises(ValueError, match="cache must not be in a request that has not ended"):
        monitor.request(held)
    with pytest.raises(
        ValueError, match="outcome must be 'completed' or 'failed' or 'cancelled', got 'abandoned'"
    ):
        request.finish("abandoned")
    request.finish()
    with pytest.raises(RuntimeError, match="ended already"):
        request.finish()
    monitor.request(held).finish()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("x", TypeError, "labels must be a mapping of names to strings, got str"),
        ({"model": 1}, TypeError, "labels must map strings to strings, got 'model': 1"),
        ({"the model": "x"}, ValueError, "labels must have names of letters.*got 'the model'"),
        ({"state": "x"}, ValueError, "labels must not be named.*got 'state'"),
    ],
)
def test_labels_that_cannot_be(labels, error, message):
    with pytest.raises(error, match=message):
        CacheMonitor(CollectorRegistry(), labels)


def test_registries_that_cannot_be():
    with pytest.raises(TypeError, match=r"registry must be a prometheus_client.CollectorRegistry, got dict"):
        CacheMonitor({})
    taken = CollectorRegistry()
    prometheus_client.Counter("lagkv_compressions", "Of somebody else.", registry=taken)
    with pytest.raises(ValueError, match="registry must not have metrics named as those of a CacheMonitor"):
        CacheMonitor(taken)
    assert [family.name for family in taken.collect()] == ["lagkv_compressions"]  # nothing of ours stayed


def test_several_models_on_one_registry():
    registry = CollectorRegistry()
    first = CacheMonitor(registry, {"model": "a", "zone": "x"})
    second = CacheMonitor(registry, {"zone": "x", "model": "b"})
    with pytest.raises(ValueError, match="registry already has a CacheMonitor with labels"):
        CacheMonitor(registry, {"model": "a", "zone": "x"})
    with pytest.raises(ValueError, match=r"labels must be \{model, zone\}, as for the first .*, got none"):
        CacheMonitor(registry)
    held = [cache(), cache()]
    with first.request(held[0]), second.request(held[1]):
        fill(held[0], 30)
        fill(held[1], 20)
    assert value(registry, "lagkv_tokens_seen_total", model="a", zone="x") == 30
    assert value(registry, "lagkv_tokens_seen_total", model="b", zone="x") == 20


def test_without_prometheus_client_it_is_said_by_name():
    code = """
import sys
sys.modules["prometheus_client"] = None
from lagkv_ext.monitor import CacheMonitor
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 1
    assert "ImportError: CacheMonitor needs prometheus-client, which is not installed here" in done.stderr
    assert "pip install 'lagkv_ext[monitoring]'" in done.stderr
