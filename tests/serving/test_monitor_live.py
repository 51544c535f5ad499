"""Scrapes while other threads generate, and servers of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.serving.monitor import CacheMonitor
from tests.cache.models import SMALL, generate, prompt, tiny_config, tiny_model
from tests.cache.padded_batches import padded, texts
from tests.serving.monitor_cases import cache, fill, total, value, values


def plain(model):
    return LagKVCache(model.config, **SMALL), {"input_ids": prompt(100), "prefill_chunk_size": 16}


def padded_batch(model):
    ids, mask = padded(texts([90, 40, 70]))
    return LagKVCache(model.config, **SMALL), {"input_ids": ids, "attention_mask": mask}


def quantized(model):
    return LagKVCache(model.config, quantization="int4", **SMALL), {"input_ids": prompt(100)}


def static(model):
    held = LagKVStaticCache(model.config, capacity=32, keep=2, **SMALL)
    return held, {"input_ids": prompt(100), "disable_compile": True}


def run(model, make, monitor=None):
    held, options = make(model)
    arguments = {"max_new_tokens": 40, "do_sample": False, **options}
    if monitor is None:
        return model.generate(**cache_argument(held), **arguments), held.report()
    with monitor.request(held):
        return model.generate(**cache_argument(held), **arguments), held.report()


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("llama", plain),
        ("llama", padded_batch),
        ("llama", quantized),
        ("llama", static),
        ("gemma3", plain),
        ("gemma3", static),
    ],
)
def test_scrapes_while_two_threads_generate(kind, make):
    """No scrape fails or shows what cannot be, the text is the same, and in the end the counters are."""
    model = tiny_model(kind)
    expected, report = run(model, make)
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    done = []

    def serve():
        for _ in range(2):
            done.append(run(model, make, monitor))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns in the middle of everything
    threads = [threading.Thread(target=serve) for _ in range(2)]
    scrapes = 0
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            found = values(registry)
            scrapes += 1
            live = {
                state: total(found, "lagkv_cache_tokens", cache="lagkv", state=state)
                for state in ("seen", "kept")
            }
            assert 0 <= live["kept"] <= live["seen"] <= 2 * report.tokens_seen
            sizes = [
                total(found, "lagkv_cache_bytes", cache="lagkv", state=x) for x in ("held", "uncompressed")
            ]
            assert min(sizes) >= 0
            assert found["lagkv_cache_reads_total", (("outcome", "failed"),)] == 0
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert scrapes > 1
    assert len(done) == 4
    for text, its_report in done:
        assert torch.equal(text, expected)
        assert its_report == report
    assert value(registry, "lagkv_requests_total", cache="lagkv", outcome="completed") == 4
    assert value(registry, "lagkv_tokens_seen_total", cache="lagkv") == 4 * report.tokens_seen
    assert value(registry, "lagkv_compressions_total") == 4 * report.compressions
    assert (
        value(registry, "lagkv_request_cache_bytes_total", cache="lagkv", state="held")
        == 4 * report.bytes_held
    )


def test_a_layer_that_is_being_moved_counts_as_before():
    """The moment in which a layer has given up its old rows and the new ones are not there yet."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    held = cache()
    with monitor.request(held):
        fill(held, 50)
        before = {
            state: value(registry, "lagkv_cache_bytes", cache="lagkv", state=state)
            for state in ("held", "uncompressed")
        }
        rows = held.layers[1].held
        buffer, rows.buffer = rows.buffer, None
        for state, size in before.items():
            assert value(registry, "lagkv_cache_bytes", cache="lagkv", state=state) == size
        rows.buffer = buffer
        fill(held, 1)
        uncompressed = value(registry, "lagkv_cache_bytes", cache="lagkv", state="uncompressed")
        assert uncompressed == held.report().bytes_uncompressed > before["uncompressed"]


class LeftAlone(LagKVLayer):
    """Whose watcher leaves as soon as somebody looks for it."""

    @property
    def timer(self):
        found, self.watcher = self.watcher, None
        return found


def test_a_watcher_may_leave_while_a_layer_compresses():
    """As a scrape does for a request that was dropped while its cache is used."""
    layer = LeftAlone(LagKVCache(tiny_config("llama"), **SMALL).layers[0].settings)
    layer.watcher = CompressionTimer()
    key, value = torch.randn(2, 1, 2, 50, 16)
    layer.update(key, value)
    assert layer.compressions > 0


def test_a_cache_whose_request_was_dropped_is_free_at_once():
    """Whoever finds out that it was dropped: scrapes, or whoever begins with that cache again."""
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    stop = threading.Event()

    def scrape():
        while not stop.is_set():
            monitor.read_live()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=scrape) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        held = cache()
        for _ in range(2000):
            monitor.request(held)  # and nobody keeps it
            time.sleep(0)  # a scrape's turn
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert value(registry, "lagkv_requests_total", cache="lagkv", outcome="abandoned") == 2000
    assert value(registry, "lagkv_requests_in_flight", cache="lagkv") == 0


def test_what_is_exported_is_text_that_parses_back():
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry, {"model": 'a "quoted" \\ name'})
    model = tiny_model("llama")
    held = LagKVCache(model.config, **SMALL)
    with monitor.request(held):
        generate(model, prompt(40), held)
    parsed = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert parsed == values(registry)


def test_counters_add_up_over_processes(tmp_path):
    """Workers forked after the monitor was made, as gunicorn --preload does."""
    code = """
    import os
    import prometheus_client
    from prometheus_client import multiprocess
    from tests.serving.monitor_cases import cache, fill, total, values
    from lagkv_ext.serving.monitor import CacheMonitor

    monitor = CacheMonitor(labels={"model": "x"})
    workers = []
    for tokens in (30, 50):
        worker = os.fork()
        if not worker:
            held = cache()
            with monitor.request(held):
                fill(held, tokens)
            open_one = monitor.request(held)
            os._exit(0)
        workers.append(worker)
    assert all(os.waitpid(x, 0)[1] == 0 for x in workers)
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    at = {"model": "x", "variant": "lagkv"}
    def show():
        found = values(registry)
        print(total(found, "lagkv_tokens_seen_total", cache="lagkv", **at))
        print(total(found, "lagkv_requests_total", cache="lagkv", outcome="completed", **at))
        print(total(found, "lagkv_request_kept_ratio_count", **at))
        print(total(found, "lagkv_requests_in_flight", cache="lagkv", **at))
        print("lagkv_cache_bytes" in {name for name, _ in found})
    show()
    for worker in workers:
        multiprocess.mark_process_dead(worker)
    show()
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    counted = ["80.0", "2.0", "2.0"]
    assert done.stdout.split() == [*counted, "2.0", "False", *counted, "0.0", "False"]
