"""CacheMonitor: counters are the sums of what reports say, whatever happens in which order."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
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
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache
from lagkv_ext.cache.report import report_of
from lagkv_ext.serving.log import JsonLines, RequestRecord
from lagkv_ext.serving.monitor import CacheMonitor
from lagkv_ext.serving.rollout import Decision
from tests.cache.families import encoder_decoder
from tests.cache.models import SMALL, generate, prompt, tiny_config, tiny_model
from tests.cache.padded_batches import padded, texts
from tests.serving.monitor_cases import cache, fill, total, value, values

CACHES = 3  # the last one is not compressed
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
    caches = [*(cache(kind) for _ in range(CACHES - 1)), DynamicCache(config=tiny_config(kind))]
    requests, before = {}, {}
    expected: Counter = Counter()
    for action, *arguments in actions:
        i = arguments[0] if arguments else 0
        of = "full" if i == CACHES - 1 else "lagkv"
        if action == "begin" and i not in requests:
            before[i], requests[i] = report_of(caches[i]), monitor.request(caches[i])
        elif action == "fill":
            fill(caches[i], arguments[1])
        elif action == "reset" and i not in requests:
            caches[i].reset()
        elif action == "finish" and i in requests:
            requests.pop(i).finish(arguments[1])
            then, now = before[i], report_of(caches[i])
            expected[of, arguments[1]] += 1
            expected[of, "seen"] += now.tokens_seen - then.tokens_seen
            expected[of, "held"] += now.bytes_held
            expected[of, "uncompressed"] += now.bytes_uncompressed
            expected["dropped"] += now.tokens_seen - now.tokens_kept - (then.tokens_seen - then.tokens_kept)
            expected["compressions"] += now.compressions - then.compressions
            expected["kept"] += of == "lagkv" and now.tokens_seen > 0
        elif action == "lose" and i in requests:
            del requests[i]
            expected[of, "abandoned"] += 1
        elif action == "scrape":
            check(registry, kind, caches, requests, expected)
    check(registry, kind, caches, requests, expected)


def check(registry, kind, caches, requests, expected):
    found = values(registry)
    at = {"model": kind}

    def one(name, **labels):
        return total(found, name, **at, **labels)

    for of in ("lagkv", "full"):
        live = [report_of(caches[i]) for i in requests if (i == CACHES - 1) == (of == "full")]
        for outcome in ("completed", "failed", "cancelled", "abandoned"):
            assert one("lagkv_requests_total", cache=of, outcome=outcome) == expected[of, outcome]
        assert one("lagkv_requests_in_flight", cache=of) == len(live)
        assert one("lagkv_request_duration_seconds_count", cache=of) == expected[of, "completed"]
        assert one("lagkv_tokens_seen_total", cache=of) == expected[of, "seen"]
        assert one("lagkv_cache_tokens", cache=of, state="seen") == sum(x.tokens_seen for x in live)
        kept = sum(x.tokens_kept for x in live)
        assert one("lagkv_cache_tokens", cache=of, state="kept") == pytest.approx(kept)
        for state, name in (("held", "bytes_held"), ("uncompressed", "bytes_uncompressed")):
            assert one("lagkv_cache_bytes", cache=of, state=state) == sum(getattr(x, name) for x in live)
            assert one("lagkv_request_cache_bytes_total", cache=of, state=state) == expected[of, state]
    assert one("lagkv_request_kept_ratio_count") == expected["kept"]
    assert one("lagkv_tokens_dropped_total") == pytest.approx(expected["dropped"])
    assert one("lagkv_compressions_total") == expected["compressions"]
    assert (one("lagkv_compression_seconds_total") > 0) >= (expected["compressions"] > 0)
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
        assert value(registry, "lagkv_cache_tokens", cache="lagkv", state="seen") == report.tokens_seen
        assert value(registry, "lagkv_cache_bytes", cache="lagkv", state="held") == report.bytes_held
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv") == report.tokens_seen > 0
    assert value(registry, "lagkv_compressions_total") == report.compressions > 0
    assert value(registry, "lagkv_compression_seconds_total") > 0
    assert value(registry, "lagkv_cache_reads_total", outcome="failed") == 0
    assert held.timer is None


def full_translation():
    model = encoder_decoder("BART")
    held = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    return held, lambda: generate(model, prompt(20), held, new=30, min_new_tokens=30, num_beams=1)


def full_static():
    model = tiny_model("gemma3")
    held = StaticCache(model.config, max_cache_len=100)
    return held, lambda: generate(model, prompt(60), held, disable_compile=True)


def full():
    model = tiny_model("llama")
    held = DynamicCache()  # layers come as they are needed
    return held, lambda: generate(model, prompt(60), held)


@pytest.mark.parametrize("make", [full, full_static, full_translation], ids=lambda x: x.__name__)
def test_caches_that_nothing_compresses_count_beside(make):
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held, run = make()
    with monitor.request(held):
        run()
        part = getattr(held, "self_attention_cache", held)
        seen = int(part.get_seq_length())
        size = sum(x.nbytes for layer in part.layers for x in (layer.keys, layer.values))
        for state in ("seen", "kept"):
            assert value(registry, "lagkv_cache_tokens", cache="full", state=state) == seen > 0
        for state in ("held", "uncompressed"):
            assert value(registry, "lagkv_cache_bytes", cache="full", state=state) == size > 0
    assert value(registry, "lagkv_tokens_seen_total", cache="full") == seen
    assert value(registry, "lagkv_request_cache_bytes_total", cache="full", state="held") == size
    assert value(registry, "lagkv_cache_reads_total", outcome="failed") == 0
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv") == 0
    assert value(registry, "lagkv_request_kept_ratio_count") == 0


def test_lengths_on_a_device_are_left_alone_by_scrapes():
    """On "meta", where reading a length raises: a scrape says that it skipped the cache, and nothing failed there."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held = LagKVStaticCache(
        tiny_config("llama"),
        capacity=32,
        keep=2,
        max_batch_size=1,
        device="meta",
        dtype=torch.float32,
        **SMALL,
    )
    request = monitor.request(held)
    failed = value(registry, "lagkv_cache_reads_total", outcome="failed")  # when it began, which must read
    assert value(registry, "lagkv_cache_reads_total", outcome="skipped") == 2
    assert value(registry, "lagkv_cache_reads_total", outcome="failed") == failed == 1
    request.finish()


def test_a_request_in_a_cycle_of_garbage_is_abandoned():
    """Found by the garbage collector, wherever that runs."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held = cache()
    cycle = [monitor.request(held)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert value(registry, "lagkv_requests_total", cache="lagkv", outcome="abandoned") == 1
    monitor.request(held).finish()  # and the cache is free


def test_outcomes_of_the_block():
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), monitor.request(cache()):
            raise error
    with monitor.request(cache()) as request:
        request.finish()  # earlier than the block
    found = {
        x: value(registry, "lagkv_requests_total", cache="lagkv", outcome=x)
        for x in ("failed", "cancelled", "completed")
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
    assert value(registry, "lagkv_cache_tokens", cache="lagkv", state="seen") == 50
    gc.disable()
    try:
        del held
        assert alive() is None
    finally:
        gc.enable()
    assert value(registry, "lagkv_cache_tokens", cache="lagkv", state="seen") == 0
    request.finish()
    assert value(registry, "lagkv_requests_in_flight", cache="lagkv") == 0
    assert (
        value(registry, "lagkv_cache_reads_total", outcome="failed") == 1
    )  # its totals are lost, and it is said


def test_a_cache_that_cannot_be_read_is_counted_and_harms_nothing(caplog):
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    broken, whole = cache(), cache()
    with monitor.request(broken), monitor.request(whole):
        fill(whole, 40)
        del broken.layers[1].held.track
        assert value(registry, "lagkv_cache_tokens", cache="lagkv", state="seen") == 40
        assert value(registry, "lagkv_cache_reads_total", outcome="failed") == 2  # by both scrapes
        assert "a cache could not be read" in caplog.text
    assert value(registry, "lagkv_requests_total", cache="lagkv", outcome="completed") == 2
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv") == 40


def test_a_time_that_cannot_be_read_harms_nothing(caplog):
    """As where a device has failed, the very moment in which failed requests must count."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held = cache()
    request = monitor.request(held)
    held.timer._events.append((None, None))  # no events: asking them fails
    request.finish("failed")
    assert "the time of compressions could not be read" in caplog.text
    assert value(registry, "lagkv_requests_in_flight", cache="lagkv") == 0
    assert value(registry, "lagkv_requests_total", cache="lagkv", outcome="failed") == 1
    with monitor.request(held):  # and nothing of it stays
        fill(held, 60)
    assert value(registry, "lagkv_compression_seconds_total") > 0


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
    from lagkv_ext.cache.compression.timer import CompressionTimer

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
    with pytest.raises(TypeError, match="cache must be a cache of transformers, got list"):
        monitor.request([])
    other, held = DynamicCache(), cache()
    with monitor.request(other), pytest.raises(ValueError, match="cache must not be in a request"):
        monitor.request(other)
    request = monitor.request(held)
    with pytest.raises(ValueError, match="cache must not be in a request"):
        CacheMonitor(CollectorRegistry()).request(held)
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
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv", model="a", zone="x") == 30
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv", model="b", zone="x") == 20


def test_a_model_loaded_again_reports_under_its_labels():
    """Counts of a closed monitor stay, and its requests in flight still count when they end."""
    registry = CollectorRegistry()
    labels = {"model": "a"}
    first = CacheMonitor(registry, labels)
    held = [cache(), cache()]
    first.request(cache())  # and nobody keeps it
    request = first.request(held[0])
    fill(held[0], 30)
    for _ in range(2):
        first.close()
    assert value(registry, "lagkv_requests_total", cache="lagkv", outcome="abandoned", model="a") == 1
    with pytest.raises(RuntimeError, match="this monitor is closed"):
        first.request(held[1])
    second = CacheMonitor(registry, labels)
    first.close()  # takes nothing from the one that came after
    with second.request(held[1]):
        fill(held[1], 20)
        assert value(registry, "lagkv_cache_tokens", cache="lagkv", state="seen", model="a") == 20
        assert value(registry, "lagkv_requests_in_flight", cache="lagkv", model="a") == 2
    request.finish()
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv", model="a") == 50
    assert value(registry, "lagkv_requests_in_flight", cache="lagkv", model="a") == 0
    closed = weakref.ref(first)
    del first, request
    gc.collect()
    assert closed() is None


def test_without_prometheus_client_it_is_said_by_name():
    code = """
import sys
sys.modules["prometheus_client"] = None
from lagkv_ext.serving.log import JsonLines, RequestRecord
from lagkv_ext.serving.monitor import CacheMonitor
from lagkv_ext.serving.rollout import Decision
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 1
    assert "ImportError: CacheMonitor needs prometheus-client, which is not installed here" in done.stderr
    assert "pip install 'lagkv_ext[monitoring]'" in done.stderr


# -- variants


def decision(variant: str, **more) -> Decision:
    return Decision(None, True, "compressed", 3, False, variant, {"keep": 2}, "id-1", 50, True, **more)


def test_variants_are_counted_apart():
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry, {"model": "m"})
    for variant, tokens in (("half", 60), ("quarter", 40)):
        held = cache()
        with monitor.request(held, decision(variant)):
            fill(held, tokens)
            assert value(registry, "lagkv_cache_tokens", variant=variant, state="seen") == tokens
            assert value(registry, "lagkv_requests_in_flight", variant=variant) == 1
    # A request of a variant that got the full cache, since its prompt was short.
    with monitor.request(full := DynamicCache(config=tiny_config("llama")), decision("half")):
        fill(full, 5)
    with monitor.request(plain := cache()):  # without a rollout
        fill(plain, 30)
    seen = {
        tuple(x for name, x in of if name in ("cache", "variant")): count
        for (name, of), count in values(registry).items()
        if name == "lagkv_tokens_seen_total"
    }
    assert seen == {
        ("lagkv", "half"): 60,
        ("full", "half"): 5,
        ("lagkv", "quarter"): 40,
        ("lagkv", "lagkv"): 30,
        ("full", "full"): 0,
    }
    for name in ("lagkv_compressions_total", "lagkv_tokens_dropped_total", "lagkv_request_kept_ratio_count"):
        assert value(registry, name, variant="half") > 0
        assert value(registry, name, variant="full") == 0


# -- the log


def test_one_record_a_request_with_the_documented_fields(caplog):
    """All fields, for each outcome, as attributes of the record and as one line of JSON."""
    monitor = CacheMonitor(CollectorRegistry(), {"model": "m"})
    held = cache()
    with caplog.at_level(logging.INFO, "lagkv_ext.requests"):
        with monitor.request(held, decision("half")):
            fill(held, 60)
        with pytest.raises(TypeError), monitor.request(held):
            fill(held, 10, batch="one")
        request = monitor.request(held)
        fill(held, 10)
        request.finish("failed")
        monitor.request(cache())  # and nobody keeps it
        monitor.read_live()
        gone = monitor.request(dropped := cache())
        del dropped
        gc.collect()
        gone.finish("cancelled")
    records = [x for x in caplog.records if x.name == "lagkv_ext.requests"]
    lines = [json.loads(JsonLines().format(x)) for x in records]
    first, _, failed, abandoned, lost = lines
    assert [x["outcome"] for x in lines] == ["completed", "failed", "failed", "abandoned", "cancelled"]
    report = held.report()
    assert set(first) == {
        "time",
        "level",
        "logger",
        "message",
        "event",
        *(x.name for x in dataclasses.fields(RequestRecord)),
    }
    assert all(set(x) == set(first) for x in lines)
    assert first["time"].endswith("Z")
    known = {
        "event": "request",
        "request_id": "id-1",
        "outcome": "completed",
        "cache": "lagkv",
        "variant": "half",
    }
    known |= {
        "reason": "compressed",
        "version": 3,
        "eligible": True,
        "settings": {"keep": 2},
        "prompt_tokens": 50,
    }
    known |= {"tokens_seen": 60, "labels": {"model": "m"}}
    assert {name: first[name] for name in known} == known
    assert first["bytes_saved"] > 0
    assert first["duration_s"] > 0
    assert (failed["outcome"], failed["tokens_seen"], failed["variant"], failed["version"]) == (
        "failed",
        10,
        "lagkv",
        None,
    )
    assert (failed["tokens_kept"], failed["compressions"]) == (report.tokens_kept, report.compressions)
    assert (failed["bytes_held"], failed["bytes_saved"]) == (report.bytes_held, report.bytes_saved)
    assert (abandoned["outcome"], abandoned["duration_s"], abandoned["tokens_seen"]) == (
        "abandoned",
        None,
        None,
    )
    assert (lost["outcome"], lost["tokens_seen"], lost["bytes_held"]) == ("cancelled", None, None)
    assert "request id-1 completed in " in first["message"]


def test_nothing_is_formatted_where_nobody_asked(caplog):
    monitor = CacheMonitor(CollectorRegistry())
    with caplog.at_level(logging.WARNING, "lagkv_ext.requests"), monitor.request(cache()):
        pass
    assert not [x for x in caplog.records if x.name == "lagkv_ext.requests"]


def test_json_lines_of_other_records():
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "it %s", ("failed",), sys.exc_info())
    data = json.loads(JsonLines().format(record))
    assert (data["message"], data["level"]) == ("it failed", "ERROR")
    assert "ZeroDivisionError" in data["exception"]
