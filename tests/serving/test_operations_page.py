"""The Python blocks of docs/operations.md run as printed, with other ports."""

from __future__ import annotations

import re
import threading
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")
pytest.importorskip("typer", reason="the command needs typer")

import prometheus_client
import torch
from typer.testing import CliRunner

from lagkv_ext.commands.cli import app
from lagkv_ext.serving.monitor import CacheMonitor
from lagkv_ext.serving.rollout.policy import parse
from tests.cache.models import prompt, tiny_config, tiny_model
from tests.evaluate import tiny_models as characters
from tests.serving.monitor_cases import value
from tests.serving.operations_page import blocks

HTTP, FASTAPI = blocks("Metrics in the server", "python")
(SERVER,) = blocks("In the server", "python")
#: Long enough that a cache with the default settings compresses it.
TEXT = "The quick brown fox jumps over the lazy dog. " * 10


@pytest.fixture
def registry(monkeypatch):
    """In place of the process's own, on which the page's monitor reports."""
    made = prometheus_client.CollectorRegistry()
    monkeypatch.setattr("lagkv_ext.serving.monitor.metrics.REGISTRY", made)
    monkeypatch.setattr(CacheMonitor.__init__, "__defaults__", (made, None))
    return made


def completed(text: str) -> str:
    labels = 'cache="lagkv",model="llama-3.1-8b",outcome="completed",variant="lagkv"'
    return re.search(rf"lagkv_requests_total\{{{labels}\}} (\S+)", text)[1]


def test_the_server_with_http_answers_and_shows_its_metrics(registry):
    block, changed = re.subn(r"\b(9400|8000)\)", "0)", HTTP)
    assert changed == 2
    block = block.replace("start_http_server(0)", "start_http_server(0, registry=registry)")
    scope = {"model": characters.model(), "tokenizer": characters.tokenizer(), "registry": registry}
    exec(block, scope)
    exporter, exporting = scope["metrics"]
    server = scope["server"]
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(url, data=TEXT.encode(), timeout=60) as answer:
            assert TEXT in answer.read().decode()
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.server_port}/metrics", timeout=60) as answer:
            assert completed(answer.read().decode()) == "1.0"
    finally:
        server.shutdown()
        server.server_close()
        serving.join()
        exporter.shutdown()
        exporter.server_close()
        exporting.join()


def test_the_server_with_fastapi_answers_and_shows_its_metrics(registry):
    pytest.importorskip("fastapi", reason="the page shows a FastAPI server")
    testclient = pytest.importorskip("fastapi.testclient", reason="its test client needs httpx")
    from lagkv_ext import LagKVCache

    block = FASTAPI.replace("make_asgi_app()", "make_asgi_app(registry)")
    scope = {
        "model": characters.model(),
        "tokenizer": characters.tokenizer(),
        "monitor": CacheMonitor(registry, {"model": "llama-3.1-8b"}),
        "LagKVCache": LagKVCache,
        "registry": registry,
    }
    exec(block, scope)
    client = testclient.TestClient(scope["app"])
    answer = client.post("/generate", params={"text": TEXT})
    assert (answer.status_code, TEXT in answer.json()) == (200, True)
    assert completed(client.get("/metrics/").text) == "1.0"


def test_the_server_with_a_rollout_checks_and_retries(tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    Path("lagkv.json").write_text('{"keep_ratio": 0.5, "lag_size": 8, "sink_size": 4}')
    options = ["--share", "1", "--check-share", "1", "--min-agreement", "0.01", "--max-kl", "1000"]
    assert CliRunner().invoke(app, ["rollout", "init", *options]).exit_code == 0
    block = SERVER.replace('"llama-3.1-8b"})', '"llama-3.1-8b"}, registry=registry)')
    scope = {"model": tiny_model("llama"), "tokenizer": None, "registry": registry}
    exec(block, scope)
    inputs = {"input_ids": prompt(60), "attention_mask": torch.ones(1, 60).long()}
    assert scope["answer"]("a", inputs).shape == (1, 110)
    scope["later"].join()
    status = scope["rollout"].status().variants["lagkv"]
    assert (status.decisions["compressed"], status.checks) == (1, 1)
    # A mask that a compressed cache refuses, and a full one takes: padding between tokens.
    inputs["attention_mask"][0, 30] = 0
    assert scope["answer"]("a", inputs).shape == (1, 110)
    for outcome in ("completed", "failed"):
        assert value(registry, "lagkv_requests_total", variant="lagkv", cache="lagkv", outcome=outcome) == 1
    for _ in range(9):
        scope["rollout"].failed(scope["rollout"].cache(request_id="a", prompt_tokens=1))
    assert scope["rollout"].status().variants["lagkv"].tripped  # the tenth failure was that request


@pytest.mark.parametrize("block", blocks("The rollout file", "json"))
def test_the_files_of_the_page_are_rollout_files(block):
    made = parse(block, "the page", tiny_config("llama"))
    assert parse(made.text, "F") == made
