"""The command ``lagkv monitor``: the dashboard and the alerts that the package brings."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Files for Prometheus and Grafana (docs/operations.md).", no_args_is_help=True)

_Output = Annotated[Path | None, typer.Option(help="Write to this file instead of printing.")]


@app.command()
def dashboard(output: _Output = None) -> None:
    """The dashboard for Grafana, to be imported there."""
    _give("dashboard.json", output)


@app.command()
def alerts(output: _Output = None) -> None:
    """The alert rules for Prometheus, a file for its rule_files."""
    _give("alerts.yml", output)


def _give(name: str, output: Path | None) -> None:
    text = resources.files("lagkv_ext.serving.monitor").joinpath(name).read_text(encoding="utf-8")
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        typer.echo(f"error: --output must be a file that can be written, got {output}: {error}", err=True)
        raise typer.Exit(2) from error
