"""``lagkv demo`` from arguments to output: load, measure with progress bars, print, draw."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib  # noqa: F401 - needed at the end only; whoever lacks it should hear so at the start
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lagkv_ext.commands.demo import facts as demo_facts
from lagkv_ext.commands.demo import picture, report
from lagkv_ext.commands.demo.facts import DemoError
from lagkv_ext.commands.demo.run import Setting, run
from lagkv_ext.commands.models import load_model

__all__ = ["DemoError", "run_demo"]


def run_demo(
    settings: Sequence[Setting],
    *,
    model: str,
    lag_size: int,
    sink_size: int,
    text: Path | None,
    facts: Path | None,
    output: Path,
    json_file: Path | None,
    dtype: torch.dtype,
    device: str,
    threads: int | None,
    rounds: int,
    seed: int,
) -> None:
    """Run the demo: print its table, write its picture to ``output`` and its raw results to ``json_file``.

    Raises DemoError and ModelError for inputs that do not work, before any measurement.
    """
    check_outputs(output, json_file)
    if (text is None) != (facts is None):
        raise DemoError(
            "--text and --facts belong together: give both, or neither for the text that comes along"
        )
    content, wanted = (
        demo_facts.short_letter() if text is None or facts is None else demo_facts.read_files(text, facts)
    )
    if threads is not None:
        torch.set_num_threads(threads)

    console = Console()
    if not console.is_terminal:
        console.width = 100  # a log has no edge of its own
    with _Stages(console) as stages:
        loaded = load_model(model, dtype=dtype, device=device, progress=stages.loading)
        stages.loaded(model)
        reading = demo_facts.read(content, wanted, loaded.tokenizer)
        result = run(
            loaded,
            reading,
            settings,
            lag_size=lag_size,
            sink_size=sink_size,
            rounds=rounds,
            seed=seed,
            progress=stages.show,
        )
        stages.show("drawing the picture", 0, 1)
        picture.draw(result, output)
        stages.show("drawing the picture", 1, 1)

    console.print(report.answers(result), "")
    console.print(report.table(result), "")
    for line in report.explanation(result):
        console.print(f"- {line}", highlight=False, markup=False)
    console.print(
        f"\nmeasured in {result.seconds:.0f} s; picture: {output.resolve()}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(result), indent=1) + "\n", encoding="utf-8")
        console.print(f"raw results: {json_file.resolve()}", highlight=False, markup=False, soft_wrap=True)


def check_outputs(output: Path, json_file: Path | None) -> None:
    """Raises DemoError where the results could not be written, before minutes of work."""
    if output.suffix.lower() not in picture.FORMATS:
        raise DemoError(f"the picture must end in one of {', '.join(picture.FORMATS)}, got {output}")
    for path in (output, json_file):
        if path is None:
            continue
        parent = path.resolve().parent
        if not parent.is_dir():
            raise DemoError(f"there is no directory {parent} to write {path.name} to")
        if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
            raise DemoError(f"{path} cannot be written")


class _Stages:
    """A progress bar per stage; where no terminal shows bars, a line when a stage begins."""

    def __init__(self, console: Console):
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Stages:
        self._bars.start()
        self._load = self._bars.add_task("loading", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def loading(self, message: str) -> None:
        self._bars.update(self._load, description=message)
        self._log(message)

    def loaded(self, model: str) -> None:
        self._bars.update(self._load, description=f"loaded {model}", total=1, completed=1)

    def show(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._log(stage)
        self._bars.update(self._tasks[stage], completed=done)

    def _log(self, message: str) -> None:
        if not self._console.is_terminal:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
