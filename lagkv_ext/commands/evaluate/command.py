"""The command ``lagkv evaluate``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_INSTALL = "pip install 'lagkv_ext[evaluation]'"


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(x.strip() for x in (text or "").split(",") if x.strip())


def _numbers(text: str | None, kind: type, option: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(x) for x in _names(text))
    except ValueError:
        raise typer.BadParameter(f"{option} must be numbers with commas between, got {text!r}") from None


def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="gemma3, smollm2 (from their PyPI packages), a directory, a .gguf file, or a hub name."
        ),
    ] = "gemma3",
    preset: Annotated[str, typer.Option(help="quick, standard, heatmap, ablation or recursion.")] = "quick",
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, with commas between.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="lagkv-blend-smooth3-head, window, h2o, ..., or module:function of your own score."
        ),
    ] = None,
    keep_ratios: Annotated[
        str | None, typer.Option(help="Shares kept of each partition, as 0.5,0.25,0.125.")
    ] = None,
    lag_sizes: Annotated[str | None, typer.Option(help="Tokens per partition, as 64,128.")] = None,
    sink_size: Annotated[int, typer.Option(help="Leading tokens that are always kept.", min=0)] = 16,
    chunks: Annotated[
        str | None,
        typer.Option(
            help="How contexts are read: whole (the default), tokens of a chunk, decode, as whole,512,decode."
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Tokens of a generated context.", min=64)] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts of each generated task.", min=1)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your own .txt, .md and .jsonl files: a folder or a file.")
    ] = None,
    longbench: Annotated[
        list[Path] | None, typer.Option(help="A LongBench .jsonl file; may be repeated.")
    ] = None,
    longbench_prompts: Annotated[Path | None, typer.Option(help="LongBench's dataset2prompt.json.")] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each LongBench file.", min=1)] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template for your prompts.")
    ] = False,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Look for the smallest cache within the tolerance instead of a full grid."
        ),
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Points that a task may lose.", min=0.0, max=100.0)] = 2.0,
    confidence: Annotated[
        float,
        typer.Option(help="Of the statement that the expected loss is within the tolerance, as 0.95."),
    ] = 0.95,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.html and pictures.")] = Path(
        "lagkv-evaluation"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew instead of taking up the results in --out.")
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Write the report from the results in --out; no model is loaded."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of prompts, random choices and intervals.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the cost table is for; 32768 by default.", min=1)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at a time in the cost table.", min=1)] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB, for the cost table.")] = 80.0,
    gpu_bandwidth: Annotated[
        float, typer.Option(help="TB/s, for the cost table (H100 SXM data sheet: 3.35).")
    ] = 3.35,
    gpu_price: Annotated[
        float | None, typer.Option(help="Per hour; without it no cost per million tokens.")
    ] = None,
) -> None:
    """Measures how far a model's cache can shrink before answers suffer, compares, recommends, and writes a report."""
    try:
        import rich.console
        import rich.progress

        from lagkv_ext.commands.evaluate import cost, onednn, report, run
        from lagkv_ext.commands.evaluate.types import EvaluationError
        from lagkv_ext.commands.models import DTYPES, ModelError, load_model

        report.require()
    except ImportError as error:
        _refuse(f"the evaluation needs {error.name or error}, which is not installed here: {_INSTALL}")
    console = rich.console.Console(stderr=True)
    machine = cost.Machine(gpu_memory * 1e9, gpu_bandwidth * 1e12, gpu_price)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    try:
        if report_only:
            path, found = run.report_again(
                out / run.RESULTS,
                out,
                tolerance=tolerance,
                confidence=confidence,
                machine=machine,
                context=context,
                batch=batch,
            )
            typer.echo(f"{found.text()}\nreport: {path.resolve()}")
            return
        plan = run.Plan(
            preset=preset,
            tasks=_names(tasks),
            methods=_names(methods),
            keep_ratios=_numbers(keep_ratios, float, "--keep-ratios"),
            lag_sizes=_numbers(lag_sizes, int, "--lag-sizes"),
            sink_size=sink_size,
            chunks=_names(chunks),
            size=size,
            prompts=prompts,
            data=data,
            longbench=tuple(longbench or ()),
            longbench_prompts=longbench_prompts,
            limit=limit,
            chat=chat,
            seed=seed,
            search=search,
            tolerance=tolerance,
            confidence=confidence,
            machine=machine,
            context=context,
            batch=batch,
        )
        if any(":" in method for method in plan.methods):
            _import_from_working_folder()
        plan.check()  # before a model is loaded
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            console=console,
        ) as bar:
            shown = bar.add_task(f"loading {model}", total=None)
            told = -1

            def progress(what: str, done: int, total: int) -> None:
                nonlocal told
                bar.update(shown, description=what, completed=done, total=total)
                # A bar is drawn on terminals alone; a log gets a line per prompt.
                if not console.is_terminal and done != told:
                    typer.echo(f"{done}/{total} {what}", err=True)
                told = done

            loaded = load_model(
                model,
                dtype=DTYPES[dtype],
                device=device,
                progress=lambda text: bar.update(shown, description=text),
            )
            onednn.use(loaded.model)
            outcome = run.evaluate(
                loaded,
                plan,
                out,
                fresh=fresh,
                command=shlex.join(["lagkv", *sys.argv[1:]]),
                progress=progress,
            )
        for x in outcome.skipped:
            typer.echo(f"left out: {x.what}: {x.why}", err=True)
        typer.echo(outcome.recommendation.text())
        if outcome.recommendation.best is not None:
            typer.echo(f"config:  {(out / 'lagkv.json').resolve()}")
            typer.echo(f"ladder:  {(out / 'lagkv-ladder.json').resolve()}")
        typer.echo(f"results: {outcome.results.resolve()}\nreport:  {outcome.report.resolve()}")
        if outcome.interrupted:
            typer.echo(
                "interrupted: the report is of what was measured so far; the same command goes on from here",
                err=True,
            )
            raise typer.Exit(130)
    except (EvaluationError, ModelError) as error:
        _refuse(error)


def _import_from_working_folder() -> None:
    """Lets module:function name a module beside the user, as under ``python -m``: a console script finds none there."""
    folder = os.getcwd()
    if "" not in sys.path and folder not in sys.path:
        sys.path.insert(0, folder)


def _refuse(message: object) -> Any:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
