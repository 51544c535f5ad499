"""The command ``lagkv``: arguments in, calls to the package, results out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from lagkv_ext.commands.demo.run import Setting

_INSTALL = "pip install 'lagkv_ext[demo]'"


def main() -> None:
    """Entry point of the console script."""
    if typer is None:
        print(
            f"error: the command lagkv needs typer, which is not installed here: {_INSTALL}", file=sys.stderr
        )
        raise SystemExit(2)
    app()


def _refuse(message: object) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _settings(ratios: str, scores: str) -> list[Setting]:
    from lagkv_ext.arguments import SCORES
    from lagkv_ext.commands.demo.run import settings_for

    try:
        numbers = [float(part.strip().removesuffix("x")) for part in ratios.split(",")]
    except ValueError:
        raise typer.BadParameter(f"must be numbers with commas between, as 2,4,8; got {ratios!r}") from None
    if not all(1 < number < float("inf") for number in numbers):
        raise typer.BadParameter(
            f"every ratio must be over 1 (4 keeps a quarter of each partition), got {ratios!r}"
        )
    names = [part.strip() for part in scores.split(",")]
    if unknown := [name for name in names if name not in SCORES]:
        raise typer.BadParameter(f"every score must be one of {', '.join(SCORES)}; got {unknown[0]!r}")
    return settings_for(list(dict.fromkeys(numbers)), list(dict.fromkeys(names)))


if typer is not None:
    app = typer.Typer(
        help="LagKV: key-value cache compression (arXiv 2504.04704).",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @app.callback()
    def _commands() -> None:
        """Keeps ``lagkv info`` a command of its own whatever other commands there are."""

    @app.command()
    def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """Lists what was built, with which instruction sets and architectures, and why something was not."""
        from lagkv_ext import __main__ as plain

        raise typer.Exit(plain.main(["info", "--json"] if as_json else ["info"]))

    @app.command(
        add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
    )
    def profile(context: typer.Context) -> None:
        """Time, bytes and GB/s of every stage of one compression, beside copying the cache (--help: its options)."""
        from lagkv_ext.commands import profile as profiling

        raise typer.Exit(profiling.main(context.args, program="lagkv profile"))

    @app.command()
    def demo(
        context: typer.Context,
        model: Annotated[
            str,
            typer.Option(
                help="smollm2, gemma3 (from their PyPI packages), a directory, a .gguf file, or a hub name."
            ),
        ] = "smollm2",
        ratios: Annotated[
            str, typer.Option(help="How many tokens become one: 4 keeps a quarter of each partition.")
        ] = "2,4,8",
        scores: Annotated[
            str,
            typer.Option(
                help="std (the paper), cosine, and blend (recommended: smoothed, one budget for all of a head)."
            ),
        ] = "std,blend",
        lag_size: Annotated[int, typer.Option(help="Tokens per partition.", min=1)] = 128,
        sink_size: Annotated[int, typer.Option(help="Leading tokens that are always kept.", min=0)] = 16,
        settings_file: Annotated[
            Path | None,
            typer.Option(
                "--settings",
                help="A lagkv.json: this cache beside the full one, in place of --ratios, --scores, --lag-size "
                "and --sink-size.",
            ),
        ] = None,
        text: Annotated[Path | None, typer.Option(help="Your own text; needs --facts.")] = None,
        facts: Annotated[
            Path | None,
            typer.Option(
                help='JSON list of {"question": "The code is", "answer": "40817"}; the text must say so.'
            ),
        ] = None,
        output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path(
            "lagkv-demo.png"
        ),
        json_file: Annotated[
            Path | None, typer.Option("--json", help="Write the raw results to this file.")
        ] = None,
        dtype: Annotated[
            str,
            typer.Option(
                help="float32, bfloat16 or float16. bfloat16 is faster where the processor has it, and rounds."
            ),
        ] = "float32",
        device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
        threads: Annotated[
            int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)
        ] = None,
        rounds: Annotated[int, typer.Option(help="Readings of the text that are timed, at most.", min=1)] = 3,
        seed: Annotated[int, typer.Option(help="Decides the order in which caches take turns.", min=0)] = 0,
    ) -> None:
        """A real model reads a text with facts in it and is asked for them: full cache against compressed caches."""
        settings = _settings(ratios, scores)
        try:
            from lagkv_ext import read_settings
            from lagkv_ext.commands.demo import run as demo_run
            from lagkv_ext.commands.demo.command import DemoError, run_demo
            from lagkv_ext.commands.models import DTYPES, ModelError
        except ModuleNotFoundError as error:
            _refuse(f"the demo needs {error.name}, which is not installed here: {_INSTALL}")
        if dtype not in DTYPES:
            raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        if settings_file is not None:
            _only_settings(context)
            try:
                given = read_settings(settings_file)
                settings = [demo_run.Setting(), demo_run.setting_of(given)]
            except (TypeError, ValueError) as error:
                _refuse(error)
            lag_size = given.get("lag_size", demo_run.LAG_SIZE)
            sink_size = given.get("sink_size", demo_run.SINK_SIZE)
        try:
            run_demo(
                settings,
                model=model,
                lag_size=lag_size,
                sink_size=sink_size,
                text=text,
                facts=facts,
                output=output,
                json_file=json_file,
                dtype=DTYPES[dtype],
                device=device,
                threads=threads,
                rounds=rounds,
                seed=seed,
            )
        except (DemoError, ModelError) as error:
            _refuse(error)

    def _only_settings(context: typer.Context) -> None:
        for name in ("ratios", "scores", "lag_size", "sink_size"):
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                option = f"--{name.replace('_', '-')}"
                raise typer.BadParameter(f"give --settings or {option}, not both: the file says what it sets")

    # Imports typer alone; what the evaluation needs besides is imported, and missed by name, when it runs.
    from lagkv_ext.commands.evaluate.command import evaluate as _evaluate

    app.command("evaluate")(_evaluate)

    from lagkv_ext.commands.explain.command import explain as _explain

    app.command("explain")(_explain)

    from lagkv_ext.serving.monitor.command import app as _monitor

    app.add_typer(_monitor, name="monitor")

    from lagkv_ext.serving.rollout.command import app as _rollout

    app.add_typer(_rollout, name="rollout")


if __name__ == "__main__":
    main()
