"""``lagkv demo`` from arguments to output: load, measure with progress bars, print, draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401 - needed at the end only; whoever lacks it should hear so at the start
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lagkv_ext.demo import facts as demo_facts
from lagkv_ext.demo import picture, report
from lagkv_ext.demo.facts import DemoError
from lagkv_ext.demo.run import Setting, run
from lagkv_ext.models import load_model

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
    dtype: torch.dtype,
    device: str,
    threads: int | None,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Run the demo, print its table, write its picture to ``output``; returns the raw results, ready for JSON.

    Raises DemoError and ModelError for inputs that do not work; both come before any measurement.
    """
    check_output(output)
    if (text is None) != (facts is None):
        raise DemoError(
            "--text and --facts belong together: give both, or neither for the text that comes along"
        )
    content, wanted = (
        demo_facts.own_text() if text is None or facts is None else demo_facts.read_files(text, facts)
    )
    if threads is not None:
        torch.set_num_threads(threads)

    console = Console()
    if not console.is_terminal:
        console.width = 150  # a log has no edge that the table would have to fit
    with _progress(console) as bars:
        loading = bars.add_task(f"loading {model}", total=None)
        loaded = load_model(
            model,
            dtype=dtype,
            device=device,
            progress=lambda message: bars.update(loading, description=message),
        )
        bars.update(loading, description=f"loaded {model}", total=1, completed=1)
        reading = demo_facts.read(content, wanted, loaded.tokenizer)
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        result = run(
            loaded,
            reading,
            settings,
            lag_size=lag_size,
            sink_size=sink_size,
            rounds=rounds,
            seed=seed,
            progress=show,
        )
        drawing = bars.add_task("drawing", total=1)
        picture.draw(result, output)
        bars.update(drawing, completed=1)

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
    return report.to_dict(result)


def check_output(output: Path) -> None:
    """Raises DemoError where the picture could not be written, before minutes of work."""
    if output.suffix.lower() not in picture.FORMATS:
        raise DemoError(f"the picture must end in one of {', '.join(picture.FORMATS)}, got {output}")
    if not output.resolve().parent.is_dir():
        raise DemoError(f"there is no directory {output.resolve().parent} to write the picture to")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
