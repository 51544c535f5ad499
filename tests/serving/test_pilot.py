"""The pilot of docs/operations.md: every command, in order and as printed, with a server that answers throughout."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")
pytest.importorskip("typer", reason="the command needs typer")
pytest.importorskip("numpy", reason="the evaluation needs numpy")

import torch
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from lagkv_ext.commands.cli import app
from lagkv_ext.serving.rollout import Store
from tests.evaluate import tiny_models as characters
from tests.serving.monitor_cases import value
from tests.serving.operations_page import blocks, save_model

COMMANDS = [
    line.partition("#")[0].strip()
    for block in blocks("A pilot", "")
    for line in block.splitlines()
    if line.strip()
]
TEXT = " ".join(f"Line {i} of a prompt: the quick brown fox {i * i}." for i in range(30))


class Server:
    """The code of the page, with its own registry, and a log of requests beside it."""

    def __init__(self, registry: CollectorRegistry):
        (server,) = blocks("In the server", "python")
        (log,) = blocks("One log record for each request", "python")
        self.tokenizer = characters.tokenizer()
        model = save_model(Path("PATH"))
        self.scope = {"model": model, "tokenizer": self.tokenizer, "registry": registry}
        labels = 'labels={"model": "llama-3.1-8b"}'
        for call in (f"CacheMonitor({labels}", f"RolloutCollector(rollout, {labels}"):
            assert server.count(call) == 1
            server = server.replace(call, f"{call}, registry=registry")
        exec(server, self.scope)
        exec(log, self.scope)
        self.rollout = self.scope["rollout"]
        self.answered = 0

    def serve(self, count: int = 12) -> None:
        """Some requests of different ids; every one is answered, with the text that the full cache gives."""
        for i in range(count):
            inputs = self.tokenizer(f"{TEXT} {i}", return_tensors="pt")
            output = self.scope["answer"](f"user-{self.answered}-{i}", dict(inputs))
            assert output.shape[1] > inputs["input_ids"].shape[1]
            self.answered += 1
        self.scope["later"].join()
        self.rollout.reload()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    logger = logging.getLogger("lagkv_ext.requests")
    handlers, level = list(logger.handlers), logger.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_model(Path("PATH"))
    Path("FOLDER").mkdir()
    for i in range(5):
        lines = (f"Line {j} of text {i}: the quick brown fox {i * j}." for j in range(40))
        Path("FOLDER", f"{i}.txt").write_text(" ".join(lines))
    yield tmp_path
    logger.setLevel(level)
    for handler in [x for x in logger.handlers if x not in handlers]:
        logger.removeHandler(handler)
        handler.close()


def test_the_pilot(folder, monkeypatch):
    registry = CollectorRegistry()
    monkeypatch.setattr("lagkv_ext.serving.monitor.metrics.REGISTRY", registry)
    server, said, seen = None, {}, {}
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] == "lagkv"
        done = CliRunner().invoke(app, words[1:], prog_name="lagkv")
        assert done.exit_code == 0, f"{command}\n{done.output}"
        said[command] = done.output
        if words[1:3] == ["rollout", "init"]:
            server = Server(registry)
        if server is not None:
            server.serve()
            status = server.rollout.status()
            seen[command] = status
            assert status.version == Store("lagkv-rollout.json").current().version
            assert not any(x.tripped for x in status.variants.values())
            assert (status.check_errors, status.failures, status.reload_errors) == (0, 0, 0)
    text = "\n".join(said.values())
    assert "lagkv-ladder.json" in said[COMMANDS[0]]
    assert "version 1 written" in text
    assert "duration_s: smallest - " in text or "too few" in text
    for name in ("lagkv-dashboard.json", "lagkv-alerts.yml"):
        assert Path(name).stat().st_size > 1000
    # From 1% to all requests.
    shares = [
        round(Store("lagkv-rollout.json").version(n).share, 9) for n in Store("lagkv-rollout.json").versions()
    ]
    assert shares[:2] == [0.01, 0.05]
    assert 1.0 in shares
    before_off = seen[next(x for x in COMMANDS if "--share 1 " in x)]
    assert before_off.variants["lagkv"].decisions["compressed"] > 0
    assert value(registry, "lagkv_requests_total", outcome="completed") == server.answered
    assert value(registry, "lagkv_requests_total", outcome="failed") == 0
    assert value(registry, "lagkv_rollout_version") == len(shares)
    records = [json.loads(line) for line in Path("requests.jsonl").read_text().splitlines()]
    assert len(records) == server.answered
    assert {x["variant"] for x in records} >= {"full", "lagkv"}
    assert "operator: on call: latency alert" in CliRunner().invoke(app, ["rollout", "history"]).output


def test_the_pilot_has_all_commands_of_the_rollout():
    used = {shlex.split(x)[2] for x in COMMANDS if x.startswith("lagkv rollout")}
    groups = {command.name or command.callback.__name__.rstrip("_") for command in _rollout_commands()}
    assert used == groups


def _rollout_commands():
    from lagkv_ext.serving.rollout.command import app as rollout

    return rollout.registered_commands


def test_checks_of_the_server_are_those_of_the_model(folder):
    """The model of this file is one on which every setting passes: else the pilot would end at the evaluation."""
    model, tokenizer = save_model(Path("PATH")), characters.tokenizer()
    from lagkv_ext.serving.rollout.check import replay

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    check = replay(model, ids, torch.full((1, 20), 5), {"keep_ratio": 0.125})
    assert (check.agreement, check.compressed) == (1.0, True)
