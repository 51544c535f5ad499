"""``python -m benchmarks.monitor``: what watching caches costs, in microseconds: a request, a compression, a scrape.

Caches of ``--layers`` layers, filled with random rows and compressed, no model. Medians of ``--rounds`` turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, generate_latest
from transformers import LlamaConfig

from lagkv_ext import LagKVCache
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.serving.monitor import CacheMonitor


def filled(layers: int) -> LagKVCache:
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    cache = LagKVCache(config, lag_size=32)
    cache.set_attention_mask(None)
    for i in range(layers):
        cache.update(torch.randn(1, 2, 500, 16), torch.randn(1, 2, 500, 16), i)
    return cache


def median(call: Callable[[], object], rounds: int) -> float:
    """Microseconds."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=32, help="caches that a scrape reads")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    registry = CollectorRegistry()
    monitor = CacheMonitor(registry)
    used, timer = filled(arguments.layers), CompressionTimer()
    empty = LagKVCache(LlamaConfig(num_hidden_layers=arguments.layers))

    def compression() -> None:
        with timer.timing(torch.device("cpu")):
            pass

    print(f"{arguments.layers} layers, medians of {arguments.rounds}, microseconds")
    for what, call in (
        ("report of a cache in use", used.report),
        ("begin and end, cache in use", lambda: monitor.request(used).finish()),
        ("begin and end, empty cache", lambda: monitor.request(empty).finish()),
        ("a compression's two clock readings", compression),
    ):
        print(f"{what:40}{median(call, arguments.rounds):10.1f}")
    caches = [filled(arguments.layers) for _ in range(arguments.in_flight)]
    requests = [monitor.request(cache) for cache in caches]
    scrape = median(lambda: generate_latest(registry), max(arguments.rounds // 10, 3))
    print(f"{f'scrape with {arguments.in_flight} caches in flight':40}{scrape:10.1f}")
    for request in requests:
        request.finish()


if __name__ == "__main__":
    main()
