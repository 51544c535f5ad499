"""The commands of the documentation run as printed: parsed by the programs themselves, run where that is cheap."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the commands need transformers")
pytest.importorskip("typer", reason="the command lagkv needs typer")
pytest.importorskip("numpy", reason="the evaluation needs numpy")

import torch

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.serving.rollout import Store
from tests.evaluate import tiny_models as characters
from tests.serving.operations_page import blocks, save_model
from tests.serving.rollout_cases import policy
from tests.tools import documented
from tests.tools.documented import ROOT, Command, check, of_page

COMMANDS = documented.commands()
#: These depend on each other: `tests/serving/test_pilot.py` runs them in order.
PILOT = {line.strip() for block in blocks("A pilot", "") for line in block.splitlines()}
#: One test for each different command; what the same words do does not depend on the page.
DIFFERENT = list({command.words: command for command in COMMANDS if command.text not in PILOT}.values())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of a reader, with the files that the pages speak of, under the names that they use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("requests.jsonl").write_text("")
    Path("lagkv.json").write_text('{"lag_size": 128, "keep_ratio": 0.25, "sink_size": 16}')
    for name in ("FOLDER", "texts/search", "texts/heldout", "data", "docs", "lagkv-evaluation"):
        Path(name).mkdir(parents=True)
    for name in ("FOLDER/a.txt", "texts/search/a.txt", "texts/heldout/a.txt"):
        Path(name).write_text("A text. " * 500)
    for name in ("prompt.txt", "prefix.txt"):
        Path(name).write_text("A text. " * 500)
    model = save_model(Path("PATH"))
    ids = characters.tokenizer()(Path("prefix.txt").read_text()[:1000], return_tensors="pt")["input_ids"]
    cache = LagKVCache(model.config)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    cache.save("prefix.safetensors")
    Path("prefix.txt").write_text(Path("prefix.txt").read_text()[:1000])
    for page in ("quality.md", "performance.md"):
        Path("docs", page).write_text("No tables here.\n")
    Store("lagkv-rollout.json").write(lambda old: policy(share=0.01))
    return tmp_path


def test_there_are_commands_on_every_page_with_shell_blocks() -> None:
    of = {command.page for command in COMMANDS if command.block}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "docs/operations.md",
        "docs/quality.md",
        "benchmarks/README.md",
    } <= of
    assert len(DIFFERENT) > 40
    assert {Path(command.words[0]).name for command in COMMANDS} >= {"lagkv", "make", "pip", "python"}


@pytest.mark.parametrize("command", DIFFERENT, ids=str)
def test_command(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "..." not in command.text.replace("/...", ""), "a command that is cut short cannot be run"
    if command.words[:3] == ("lagkv", "rollout", "init"):
        Path("lagkv-rollout.json").unlink()
    check(command, monkeypatch)


def test_shell_blocks_are_shell() -> None:
    for page in {command.page for command in COMMANDS if command.block}:
        for match in documented._BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
            if not match[1] and any(x.block for x in of_page(page, match[0])):
                done = subprocess.run(
                    ["bash", "-n"], input=match[2], capture_output=True, text=True, timeout=60
                )
                assert (done.returncode, done.stderr) == (0, ""), f"{page}: {match[2]}"
                others = [x for x in _first_words(match[2]) if x not in documented.PROGRAMS]
                assert all(Path(x).name in ("pip", "python") or x in ("cd", "git") for x in others), others


def _first_words(block: str) -> list[str]:
    lines = re.sub(r"\\\n", "", block).splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]


# -- the finder and the checks themselves


def test_what_is_found() -> None:
    page = (
        "A `lagkv demo` and `LagKVCache`, ``make lint``.\n"
        "```\npip install x && python -m y  # why\nlagkv evaluate --seed 1 \\\n    --threads 2\ncompress(key)\n```\n"
        "```python\nmake = 1\n```\n"
    )
    found = [(x.line, x.words, x.block) for x in of_page("p", page)]
    assert found == [
        (3, ("pip", "install", "x"), True),
        (3, ("python", "-m", "y"), True),
        (4, ("lagkv", "evaluate", "--seed", "1", "--threads", "2"), True),
        (1, ("lagkv", "demo"), False),
        (1, ("make", "lint"), False),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "lagkv evaluate --no-such-option 1",
        "lagkv evaluate --methods no-such-method",
        "lagkv evaluate --methods no_such_module:function",
        "lagkv evaluate --preset none",
        "lagkv demo --ratios 0.5",
        "lagkv demo --settings none.json",
        "lagkv rollout set --no-such-option 1",
        "lagkv rollout mend",
        "lagkv profile --no-such-option 1",
        "lagkv monitor dashboards",
        "make no-such-target",
        "make demo NO_SUCH_VARIABLE=1",
        "pip install '.[none]'",
        "pip instal .",
        "python -m lagkv_ext inform",
        "python -m benchmarks.run --no-such-option 1",
        "python -m benchmarks.none",
        "python tools/none.py",
        "python -m tools.gpu_check --no-such-option",
        "python -m pytest tests/none.py",
    ],
)
def test_what_does_not_run_is_caught(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = of_page("p", f"```\n{text}\n```\n")
    with pytest.raises((AssertionError, SystemExit, ImportError, argparse.ArgumentError)):
        check(command, monkeypatch)


def test_own_scores_are_found_in_the_working_folder(folder: Path) -> None:
    """As the console script is started, which has its own folder in sys.path, not the working one."""
    Path("my_scores.py").write_text("def first(layer):\n    return -layer.key[..., 0].float().cumsum(-1)\n")
    (folder / "bin").mkdir()
    script = folder / "bin" / "lagkv"
    script.write_text("from lagkv_ext.commands.cli import main\nmain()\n")
    done = subprocess.run(
        [sys.executable, script, "evaluate", "--methods", "my_scores:first", "--model", "/nonexistent"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": ""},
    )
    assert (done.returncode, "cannot be imported" in done.stderr) == (2, False)
    assert "/nonexistent" in done.stderr  # the model is what is missing
