"""The command ``lagkv evaluate``: from arguments to files and exit codes."""

from __future__ import annotations

import json

import pytest
import torch

from lagkv_ext.commands import models
from tests.evaluate import tiny_models as evaluate_models

pytest.importorskip("typer", reason="the command needs typer")
pytest.importorskip("jinja2", reason="the report needs jinja2")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

SMALL = ["--tasks", "passkey", "--size", "400", "--prompts", "1", "--lag-sizes", "32", "--threads", "1"]
FEW = [*SMALL, "--methods", "lagkv-std,window", "--keep-ratios", "0.5"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(models, "load_model", lambda *a, **k: evaluate_models.loaded())
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    from typer.testing import CliRunner

    from lagkv_ext.commands.cli import app

    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_measures_reports_and_reports_again(tmp_path):
    result = run(*FEW, "--out", tmp_path, "--gpu-price", "2")
    assert result.exit_code == 0, result.output
    assert "0/1 passkey" in result.output
    assert f"report:  {tmp_path / 'report.html'}" in result.output
    lines = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [x["kind"] for x in lines] == ["run", "result", "result", "result", "attempt"]
    assert lines[0]["plan"]["keep_ratios"] == [0.5]
    assert lines[0]["versions"]["torch"] == torch.__version__
    assert "cost per million tokens" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    result = run("--report-only", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").exists()


def test_search_writes_a_config_that_makes_the_cache(tmp_path):
    from lagkv_ext import LagKVCache, read_settings

    # Fidelity: on retrieval a random model has nothing to lose, and such tasks do not count.
    result = run(
        *SMALL,
        "--tasks",
        "fidelity",
        "--search",
        "--keep-ratios",
        "0.5,0.25",
        "--tolerance",
        "100",
        "--out",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    config = read_settings(tmp_path / "lagkv.json")
    cache = LagKVCache(evaluate_models.model().config, **config)
    assert cache.layers[1].settings.keep == 8  # everything is within 100 points: the smallest ratio wins
    assert f"LagKVCache(model.config, keep_ratio={config['keep_ratio']!r}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "there is no preset 'huge'"),
        (["--methods", "magic"], "there is no method 'magic'"),
        (["--keep-ratios", "2"], "every keep ratio must be in (0, 1], got 2.0"),
        (["--keep-ratios", "half"], "must be numbers with commas between, got 'half'"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--report-only"], "cannot be read"),
        (["--data", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_wrong_arguments_end_with_2_and_say_why(tmp_path, arguments, message):
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run()
    assert result.exit_code == 2
    assert "jinja2" in result.output
    assert "lagkv_ext[evaluation]" in result.output


def test_interruption_ends_with_130(tmp_path, monkeypatch):
    from lagkv_ext.commands.evaluate.runner import Runner

    real, count = Runner._record, []

    def record(self, *arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Runner, "_record", record)
    result = run(*FEW, "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.output
