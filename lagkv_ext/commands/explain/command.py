"""The command ``lagkv explain``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

_INSTALL = "pip install 'lagkv_ext[evaluation]'"


def explain(
    text: Annotated[
        str | None, typer.Option(help="The text: a UTF-8 file, or - for the standard input.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="gemma3, smollm2 (from their PyPI packages), a directory, a .gguf file, or a hub name."
        ),
    ] = "gemma3",
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="A lagkv.json: the cache's settings.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="One setting of LagKVCache, as keep_ratio=0.25 or score=cosine; may be repeated."
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens read at a time, as servers do; by default all at once.", min=1)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A file of LagKVCache.save, in place of reading a text; --text is then the text that it was "
            "made from, where that is known."
        ),
    ] = None,
    sequence: Annotated[int, typer.Option(help="Of the batch in --cache.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("lagkv-explain.html"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the same as JSON to this file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch's own choice by default.", min=1)
    ] = None,
) -> None:
    """Shows which tokens of a text a compressed cache kept, in every layer and head: one page that loads nothing."""
    if text is None and cache is None:
        raise typer.BadParameter("give --text with the text to read, or --cache with a saved cache")
    if cache is not None and (settings_file is not None or setting or chunk is not None):
        raise typer.BadParameter("--cache has its settings in it: leave out --settings, --set and --chunk")
    try:
        import rich.console

        from lagkv_ext.commands.explain import page, run
        from lagkv_ext.commands.explain.explanation import ExplainError
        from lagkv_ext.commands.explain.tokens import tokenize
        from lagkv_ext.commands.models import DTYPES, ModelError, load_model, load_without_weights

        page.require()
    except ImportError as error:
        _refuse(f"explain needs {error.name or error}, which is not installed here: {_INSTALL}")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    try:
        content = None if text is None else _text(text)
        settings = _settings(settings_file, setting or [])
        console = rich.console.Console(stderr=True)
        with console.status("") as status:

            def say(message: str) -> None:
                status.update(message)
                # A status is drawn on terminals alone.
                if not console.is_terminal:
                    typer.echo(message, err=True)

            if cache is not None:
                config, tokenizer = load_without_weights(model, progress=say)
                tokens = None if content is None else tokenize(tokenizer, content)
                found = run.explain_saved(cache, config, model=model, tokens=tokens, sequence=sequence)
            else:
                assert content is not None
                if threads is not None:
                    import torch

                    torch.set_num_threads(threads)
                if not content:
                    raise ExplainError(f"the text {text} is empty: there is nothing to explain")
                loaded = load_model(model, dtype=DTYPES[dtype], device=device, progress=say)
                found = run.explain(
                    loaded,
                    content,
                    settings,
                    chunk=chunk,
                    progress=lambda what, done, total: say(f"{what}: {done} of {total} tokens"),
                )
            say("writing the page")
            if json_file is not None:
                _write(json_file, json.dumps(found.to_json(), ensure_ascii=False) + "\n")
            _write(out, page.html(found))
        for note in found.notes():
            typer.echo(note, err=True)
        typer.echo(f"page: {out.resolve()}")
        if json_file is not None:
            typer.echo(f"json: {json_file.resolve()}")
    except (ExplainError, ModelError) as error:
        _refuse(error)


def _text(source: str) -> str:
    from lagkv_ext.commands.explain.explanation import ExplainError
    from lagkv_ext.user_files import decode

    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return decode(data, "the standard input" if source == "-" else f"the text {source}")
    except OSError as error:
        raise ExplainError(f"the text {source} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ExplainError(str(error)) from error


def _settings(path: Path | None, given: list[str]) -> dict[str, Any]:
    """From the file, and over it what is given one by one: JSON values, or plain words for text."""
    from lagkv_ext.commands.explain.explanation import ExplainError
    from lagkv_ext.settings_file import checked_settings, read_settings

    named: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ExplainError(f"--set must be NAME=VALUE, as keep_ratio=0.25; got {item!r}")
        try:
            named[name] = json.loads(value)
        except ValueError:
            named[name] = value
    try:
        settings = {} if path is None else read_settings(path)
        named = checked_settings(named, "--set")
    except ValueError as error:
        raise ExplainError(str(error)) from error
    # The two ways to say how much is kept exclude each other.
    if named.keys() & {"keep", "keep_ratio"}:
        settings = {k: v for k, v in settings.items() if k not in ("keep", "keep_ratio")}
    return {**settings, **named}


def _write(path: Path, content: str) -> None:
    """The file is there as a whole or not at all. Raises ExplainError where it cannot be written."""
    from lagkv_ext.commands.explain.explanation import ExplainError

    try:
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
            os.chmod(unfinished, 0o666 & ~_umask())
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        raise ExplainError(f"{path} cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse(message: object) -> Any:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
