"""LagKVStaticCache in compiled and captured steps: one graph while it fills, compresses and starts again; endless."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.cache.settings import layer_settings, with_capacity
from lagkv_ext.cache.static.layer import LagKVStaticLayer
from tests.cache.models import SMALL, forward, generate, prompt, several_tokens_compiled, tiny_model

BUDGET = 22


@pytest.fixture(autouse=True)
def _fresh_compiler():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def shallow(kind, attention="sdpa", dtype=torch.float64):
    """One layer of each kind of a tiny model: every layer costs seconds of compilation."""
    model = copy.deepcopy(tiny_model(kind, attention, dtype))
    count = 2 if kind == "gemma3" else 1
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if kind == "gemma3":
        model.config.layer_types = model.config.layer_types[:count]
    return model


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def addresses(cache):
    return [x.data_ptr() for layer in cache.layers for x in layer.storages()]


def restarts(cache):
    return [int(x.restarts.min()) for x in cache.layers if isinstance(x, LagKVStaticLayer)]


@pytest.mark.parametrize(
    ("kind", "attention", "compiler"),
    [
        ("llama", "sdpa", "aot_eager"),
        ("llama", "eager", "aot_eager"),
        ("gemma3", "sdpa", "eager"),  # tracing alone: the rest takes long for four layers
    ],
)
def test_one_graph_for_all_steps(kind, attention, compiler):
    """From the first token on: the window fills, layers compress, and start again from the sink."""
    model, ids = shallow(kind, attention), prompt(90, batch=2)
    cache = LagKVStaticCache(
        model.config, capacity=BUDGET, max_batch_size=2, dtype=torch.float64, keep=2, **SMALL
    )
    before = addresses(cache)
    step = torch.compile(
        lambda token: model(input_ids=token, **cache_argument(cache)).logits, fullgraph=True, backend=compiler
    )
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        logits = torch.cat([step(token) for token in ids.split(1, dim=1)], dim=1)
    assert compilations() == 1
    growing = LagKVCache(model.config, max_tokens=BUDGET, keep=2, **SMALL)
    close = {"rtol": 1e-10, "atol": 1e-10} if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits, forward(model, growing, ids, [1] * 90), **close)
    assert cache.kept_hash() == growing.kept_hash()
    assert min(restarts(cache)) > 2
    assert addresses(cache) == before


@several_tokens_compiled
def test_steps_of_several_tokens_compile_once():
    """A prompt, too, may go through the compiled step, ``step_tokens`` at a time."""
    model, ids = shallow("gemma3"), prompt(90, batch=2)
    settings = {"keep": 2, **SMALL}
    cache = LagKVStaticCache(
        model.config, capacity=BUDGET + 4, step_tokens=5, max_batch_size=2, dtype=torch.float64, **settings
    )
    step = torch.compile(
        lambda tokens: model(input_ids=tokens, **cache_argument(cache)).logits,
        fullgraph=True,
        backend="eager",
    )
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        logits = torch.cat([step(tokens) for tokens in ids.split(5, dim=1)], dim=1)
    growing = LagKVCache(model.config, max_tokens=BUDGET, **settings)
    torch.testing.assert_close(logits, forward(model, growing, ids, [5] * 18), rtol=1e-10, atol=1e-10)
    assert cache.kept_hash() == growing.kept_hash()
    assert min(restarts(cache)) > 2


def test_generate_compiles_its_steps_once():
    """As on a GPU: generate compiles decoding by itself where a cache says that it can be."""
    model, ids = shallow("gemma3"), prompt(45, batch=2)
    growing = LagKVCache(model.config, max_tokens=BUDGET, keep=2, **SMALL)
    cache = LagKVStaticCache(model.config, capacity=BUDGET, keep=2, **SMALL)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    compile_config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        text = generate(model, ids, cache, new=70, compile_config=compile_config)
    assert compilations() == 1
    assert torch.equal(text, generate(model, ids, growing, new=70))
    assert cache.kept_hash() == growing.kept_hash()


def test_endless_decoding():
    """100,000 tokens through one compiled step of one layer: memory stands still."""
    settings = layer_settings(
        lag_size=16,
        keep=4,
        keep_ratio=None,
        sink_size=4,
        value_weight=1.0,
        score="std",
    )
    layer = LagKVStaticLayer(with_capacity(settings, 100, 1), 100, 1)
    pool = torch.randn(1009, 2, 1, 2, 1, 64, generator=torch.Generator().manual_seed(0))
    states = [(key, value) for key, value in pool]
    layer.lazy_initialization(*states[0])
    before = [x.data_ptr() for x in layer.storages()]

    def step(key, value):
        key, value = layer.update(key, value)
        return key[0, 0, 0, 0] + value[0, 0, 0, 0]

    with torch.no_grad():
        step = torch.compile(step, fullgraph=True)
        _, code = run_and_get_code(step, *states[0])
        for i in range(1, 10_000):
            step(*states[i % 1009])
        growing = LagKVLayer(layer.settings)
        for i in range(10_000):
            growing.update(*states[i % 1009])
        assert torch.equal(layer.kept_positions(), growing.kept_positions())
        resident = resident_bytes()
        for i in range(10_000, 100_000):
            step(*states[i % 1009])
    grown = resident_bytes() - resident
    assert compilations() == 1
    assert [x.data_ptr() for x in layer.storages()] == before
    assert int(layer.seen) == 100_000
    assert layer.rows < 100
    # A layer that grows by keep rows for lag_size tokens would have taken 23 MB more.
    assert grown < 4e6, f"{grown / 1e6:.1f} MB"
    # The slots are neither copied nor made anew: all that a step allocates together is less than the keys of one head.
    sizes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\), \(", "".join(code))
    allocated = [math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes]
    assert len(allocated) >= 2, "the generated code names its buffers otherwise: read it, and mend this test"
    assert sum(allocated) < 100 * 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_captured_step_is_replayed_as_the_cache_fills_and_starts_again(kind):
    """One CUDA graph, captured once; then the cache is reset, and the graph replayed for every token."""
    model = copy.deepcopy(tiny_model(kind, "sdpa", torch.float64)).cuda()
    ids = prompt(90, batch=2).cuda()
    growing = LagKVCache(model.config, max_tokens=BUDGET, keep=2, **SMALL)
    expected = forward(model, growing, ids, [1] * 90)
    cache = LagKVStaticCache(
        model.config,
        capacity=BUDGET,
        max_batch_size=2,
        dtype=torch.float64,
        device="cuda",
        keep=2,
        **SMALL,
    )
    token = ids[:, :1].clone()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(input_ids=token, **cache_argument(cache))
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits = model(input_ids=token, **cache_argument(cache)).logits
    cache.reset()
    before, results = addresses(cache), []
    for i in range(90):
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        results.append(logits.clone())
    torch.testing.assert_close(torch.cat(results, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert cache.kept_hash() == growing.kept_hash()
    assert cache.get_seq_length() == 90
    assert min(restarts(cache)) > 2
    assert addresses(cache) == before
    more = prompt(30, batch=2, seed=1).cuda()  # a prompt in between, outside of the graph
    torch.testing.assert_close(
        forward(model, cache, more, [30]), forward(model, growing, more, [30]), rtol=1e-10, atol=1e-10
    )


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell the resident memory of a process")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text()).group(1)) * 1024
