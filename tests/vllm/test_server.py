"""The OpenAI server: concurrent streams, cancelled requests, prefix hits, and the plugin's numbers in /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from lagkv_ext.serving.rollout import Check, Guard, Policy, Store, Variant
from lagkv_ext.serving.rollout.check import replay
from lagkv_ext.vllm.check import Deployment
from tests.serving.operations_page import blocks
from tests.vllm.cache import cache_tokens
from tests.vllm.engine import BLOCK, ENVIRONMENT
from tests.vllm.models import prompt

ROOT = Path(__file__).resolve().parents[2]
NEW = 30
SETTINGS = {"lag_size": 128, "keep_ratio": 0.25, "sink_size": 16}


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory) -> Iterator[str]:
    settings = tmp_path_factory.mktemp("settings") / "lagkv.json"
    settings.write_text(json.dumps(SETTINGS))
    with running(llama, tmp_path_factory.mktemp("log"), {"lagkv": str(settings)}) as url:
        yield url


@contextlib.contextmanager
def running(model: Path, folder: Path, additional: dict[str, Any]) -> Iterator[str]:
    """The address of a server with ``additional`` as vLLM's additional configuration."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "server.log").open("w")
    module = "vllm.entrypoints.openai.api_server"
    command = [
        *(sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), "--model", str(model)),
        *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
        *("--block-size", str(BLOCK), "--max-model-len", "2048", "--max-num-batched-tokens", "512"),
        *("--num-gpu-blocks-override", "150", "--additional-config", json.dumps(additional)),
    ]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, Path(log.name).read_text()[-6000:]
            assert time.monotonic() < deadline, Path(log.name).read_text()[-6000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def body(tokens: list[int], new: int = NEW) -> dict:
    return {
        "model": "tiny",
        "prompt": tokens,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(client: httpx.AsyncClient, tokens: list[int], new: int = NEW, cancel_after: int = 0) -> str:
    """The text of one request, of which the client hangs up after ``cancel_after`` pieces if that is given."""
    text, pieces = "", 0
    async with client.stream("POST", "/v1/completions", json=body(tokens, new)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: "))["choices"]
            text += choices[0]["text"] if choices else ""
            pieces += 1
            if pieces == cancel_after:
                break
    return text


async def answer(url: str, tokens: list[int], new: int) -> str:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        return await stream(client, tokens, new)


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_concurrent_streams_cancelled_requests_and_prefix_hits(server, llama):
    shared = prompt(700, seed=31)
    prompts = [shared + prompt(50 + i, seed=32) for i in range(3)] + [
        prompt(n, seed=33) for n in (20, 400, 900)
    ]
    expected = [cache_tokens(llama, tokens, NEW, boundary=256, keep=32) for tokens in prompts]

    async def load() -> list[str]:
        async with httpx.AsyncClient(base_url=server, timeout=300) as client:
            cancelled = [stream(client, prompt(600, seed=40 + i), 400, cancel_after=3 + i) for i in range(4)]
            wanted = [stream(client, tokens) for tokens in prompts]
            first = await asyncio.gather(*wanted, *cancelled)
            second = await asyncio.gather(*(stream(client, tokens) for tokens in prompts))
            assert second == first[: len(prompts)]
            return second

    texts = asyncio.run(load())
    assert [[int(word) for word in text.split()] for text in texts] == expected

    # When the last request has ended all blocks are free, and the plugin's numbers are those of the requests.
    deadline = time.monotonic() + 60
    while _value(found := metrics(server), "lagkv_vllm_requests_total") < 16:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert _value(found, "vllm:kv_cache_usage_perc") == 0
    assert found['lagkv_vllm_requests_total{cache="full",model="tiny"}'] == 4  # 20 and 400 tokens, twice
    assert found['lagkv_vllm_requests_total{cache="compressed",model="tiny"}'] == 8 + 4
    assert _value(found, "lagkv_vllm_tokens") == 0
    partitions = found['lagkv_vllm_partitions_compressed_total{model="tiny"}']
    assert found['lagkv_vllm_rows_dropped_total{model="tiny"}'] == partitions * 96
    assert (
        partitions >= 4 + 4 + 4 * 2
    )  # of the shared prefix, the prompt of 900, and those that were cancelled
    assert found['lagkv_vllm_compression_seconds_total{model="tiny",rank="0"}'] > 0
    hits = _value(found, "vllm:prefix_cache_hits_total")
    assert hits >= 3 * 640


def _value(found: dict[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.split("{")[0] == name)


def test_a_request_longer_than_the_model_is_refused_and_the_server_lives(server):
    answer = httpx.post(f"{server}/v1/completions", json={**body(prompt(2100)), "stream": False}, timeout=60)
    assert answer.status_code == 400
    assert httpx.get(f"{server}/health").status_code == 200


def test_a_rollout_routes_and_checks_two_deployments(server, llama, tmp_path, monkeypatch):
    """The router of docs/operations.md: variants by request, checks by both deployments, and the guard."""
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "boundary": 256}
    Path("quarter.json").write_text(json.dumps(settings))
    guard = Guard(min_agreement=0.95, max_kl=1e3, check_share=1.0)
    policy = Policy(1, True, {"quarter": Variant(0.5, settings)}, 512, guard)
    Store("lagkv-rollout.json").write(lambda old: policy)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with running(llama, tmp_path, {}) as stock:
        (page,) = blocks("In front of vLLM", "python")
        page = page.replace("meta-llama/Llama-3.1-8B-Instruct", str(llama)).replace(", MODEL)", ', "tiny")')
        page = page.replace("http://full:8000", stock).replace("http://quarter:8000", server)
        asked: Counter[str] = Counter()
        checks: list[Check] = []

        def forward(to: Deployment, prompt_ids: list[int]) -> list[int]:
            asked[to.url] += 1
            return [int(word) for word in asyncio.run(answer(to.url, prompt_ids, 10)).split()]

        scope: dict[str, Any] = {"forward": forward}
        exec(page, scope)
        rollout = scope["rollout"]
        count = rollout.add_check
        rollout.add_check = lambda check, **about: checks.append(check) or count(check, **about)
        for i in range(60):
            ids = prompt(800, seed=60 + i)
            before = len(checks)
            output = scope["answer"](f"user-{i}", ids)
            assert len(output) == 10
            if len(checks) > before:
                expected = replay(model, torch.tensor([ids]), torch.tensor([output]), settings)
                assert checks[-1].compressed == expected.compressed is True
                assert checks[-1].agreement == expected.agreement
                assert checks[-1].kl <= expected.kl + 1e-5  # the server lists 20 tokens of 512
            if rollout.status().variants["quarter"].tripped:
                break
        # A random model loses much with a quarter of its cache. The guard sees it.
        assert set(asked) == {stock, server}
        assert rollout.status().variants["quarter"].checks == len(checks) == asked[server]
        assert rollout.status().variants["quarter"].tripped
        asked.clear()
        for i in range(4):
            scope["answer"](f"user-{i}", prompt(600, seed=i))
        assert set(asked) == {stock}
