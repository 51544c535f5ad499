"""``lagkv rollout``: what operators type, and what it prints and does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command needs typer")
pytest.importorskip("transformers", reason="the rollout needs transformers")

from typer.testing import CliRunner

from lagkv_ext.commands.cli import app
from lagkv_ext.serving.rollout import Check, Rollout, Store, Trip
from lagkv_ext.serving.rollout.evidence import Evidence
from tests.cache.models import tiny_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of an operator, with what `lagkv evaluate` found."""
    monkeypatch.chdir(tmp_path)
    Path("lagkv.json").write_text('{"keep_ratio": 0.5, "lag_size": 8, "sink_size": 4}')
    return tmp_path


def run(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["rollout", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


def store() -> Store:
    return Store("lagkv-rollout.json")


def test_the_whole_way(folder):
    assert "lagkv-rollout.json: version 1 written" in run(
        "init", "--min-prompt-tokens", 50, "--check-share", 1
    )
    assert (store().current().share, store().current().variants["lagkv"].settings["keep_ratio"]) == (
        0.01,
        0.5,
    )
    rollout = Rollout("lagkv-rollout.json", tiny_config("llama"), reload_s=0)
    said = run("set", "--share", 0.25)
    assert "lagkv-rollout.json from version 1: version 2 written\n  share 0.01 -> 0.25\n" in said
    Path("better.json").write_text('{"keep_ratio": 0.75, "score": "cosine"}')
    said = run("set", "--share", 1, "--settings", "better.json", "--max-kl", 0.5, "--max-errors", 0)
    assert [x.strip() for x in said.splitlines()[1:]] == [
        "share 0.25 -> 1.0",
        "settings.keep_ratio 0.5 -> 0.75",
        'settings.score unset -> "cosine"',
        "guard.max_kl 0.1 -> 0.5",
        "guard.max_errors 10 -> null",
        "settings.lag_size 8 -> unset",
        "settings.sink_size 4 -> unset",
    ]
    assert rollout.cache(request_id="a", prompt_tokens=50).reason == "compressed"
    assert "version 4 written\n  enabled true -> false" in run("off")
    assert rollout.cache(request_id="a", prompt_tokens=50).reason == "disabled"
    assert "says so already: nothing was written" in run("off")
    assert "off: every request gets the full cache" in run("show")
    assert "version 5 written\n  enabled false -> true" in run("on")
    assert "content of version 4\n" in run("back", "--dry-run")
    assert "content of version 2\n" in run("back", 2)
    assert (store().current().version, store().current().share) == (6, 0.25)
    lines = run("history").splitlines()
    assert [x.split()[0] for x in lines] == [str(n) for n in range(1, 7)]
    assert all(re.fullmatch(r"[\d-]{10}T[\d:]{8}Z", x.split()[1]) for x in lines)  # as the times of trips
    assert lines[3].endswith("enabled true -> false")
    assert rollout.status().version == 6


def test_a_trip_is_shown_and_back_passes_it_by(folder):
    run("init", "--share", 0.1)
    run("set", "--share", 0.5)
    for check in (Check(0.5, 0.25, 4, 9), Check(1.0, 0.75, 4, 9)):
        Evidence(store().checks_of(2)).append(check)
    assert "lagkv: 2 checks, agreement 0.7500 over the last 2, at least 0.000 and at most" in run("show")
    assert "KL 0.5000 nats per token (guard: at least 0.97, at most 0.1, level 0.01)" in run("show")
    store().record_trip(Trip(2, "why not", "2026-01-01T00:00:00Z", 7, 2, 0.75, 0.5))
    assert (
        "lagkv: TRIPPED 2026-01-01T00:00:00Z by process 7: why not; its requests get the full cache"
        in run("show")
    )
    shown = json.loads(run("show", "--json"))
    now = shown["now"]["lagkv"]
    assert (shown["version"], now["checks"], now["agreement"], now["kl"]) == (2, 2, 0.75, 0.5)
    assert now["trip"]["reason"] == "why not"
    store().tripped().unlink()  # which undoes nothing
    assert "TRIPPED 2026-01-01T00:00:00Z by process 7: why not" in run("show")
    said = run("on")
    assert "version 3 written" in said
    assert "lagkv had tripped (why not); version 3 begins anew" in said
    assert json.loads(run("show", "--json"))["now"]["lagkv"]["trip"] is None
    assert "tripped 2026-01-01T00:00:00Z: why not" in run("history")
    assert "content of version 1\n" in run("back")  # not 2
    assert "version 2 tripped: why not; --even-if-tripped takes it anyway" in run("back", 2, status=2)
    assert store().current().share == 0.1
    run("back", 2, "--even-if-tripped")
    assert store().current().share == 0.5


def test_refusals_say_why_and_write_nothing(folder):
    run("off", status=2)
    assert "there is no rollout file lagkv-rollout.json; make one with lagkv rollout init" in run(
        "set", "--share", 0.5, status=2
    )
    assert "cannot be read: No such file" in run("init", "--settings", "none.json", status=2)
    Path("wrong.json").write_text('{"keep_ratio": 7}')
    assert "keep_ratio must be in (0, 1], got 7" in run("init", "--settings", "wrong.json", status=2)
    assert "share must be a number from 0 to 1, got 1.5" in run("init", "--share", 1.5, status=2)
    assert not Path("lagkv-rollout.json").exists()
    run("init", "--dry-run")
    assert not Path("lagkv-rollout.json").exists()
    run("init")
    assert "is there already, version 1: change it with lagkv rollout set" in run("init", status=2)
    assert "say what to set: --share" in run("set", status=2)
    assert "guard.level must be a number over 0 to 0.5, got 0.7" in run("set", "--level", 0.7, status=2)
    assert f"there is no version 9 of {folder / 'lagkv-rollout.json'}; known: 1" in run("back", 9, status=2)
    assert "there is no version before 1 that differs and did not trip" in run("back", status=2)
    assert store().versions() == [1]
    tiny_config("gemma3").save_pretrained("model")
    Path("layers.json").write_text('{"layer_keep_ratio": {"0": 0.5}}')
    said = run("set", "--settings", "layers.json", "--model", "model", status=2)
    assert "layer_keep_ratio names layer 0, which is no full-attention layer" in said
    run("set", "--settings", "layers.json", "--share", 0.5)  # without the model nobody can know


def test_off_and_back_work_where_the_file_is_damaged_or_gone(folder, monkeypatch):
    monkeypatch.setenv("LAGKV_ROLLOUT", str(folder / "other.json"))
    run("init", folder / "other.json", "--share", 0.1)
    run("set", "--share", 0.2)
    Path("other.json").write_text("{")
    for command in (("set", "--share", 0.3), ("on",), ("show",)):
        assert "is not valid JSON" in run(*command, status=2)
    assert "from version 2: version 3 written\n  enabled true -> false" in run("off")
    Path("other.json").unlink()
    assert "version 4 written\n  enabled false -> true" in run("back")
    Path("other.json").unlink()
    assert "there is no rollout file" in run("on", status=2)
    assert "version 5 written" in run("off")  # as version 4, but off
    Path("other.json").unlink()
    assert "version 6 written" in run("init", folder / "other.json")  # the numbers go on
    Path("other.history/000002.json").write_text("{")
    assert "is not valid JSON" in run("history")
