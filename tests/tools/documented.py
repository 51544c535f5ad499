"""The commands that the documentation prints, and how each is parsed by the program that it would start."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md")
SOURCES = ("examples/*.py",)
#: The first word of what is a command; other blocks without a language are signatures and the like.
PROGRAMS = ("lagkv", "make", "pip", "python", ".venv/bin/python", "python3")
#: Programs without options that are quick: run wholly, in the folder that the test made.
RUN = ("lagkv_ext", "lagkv_ext.commands.evaluate.markdown", "benchmarks.heldout_texts")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)(`{1,2})([^`]+)\1(?!`)")


@dataclass(frozen=True)
class Command:
    """One command as it is printed."""

    page: str
    line: int
    text: str
    words: tuple[str, ...]
    block: bool  #: of a shell block, not within a sentence
    stdin: str | None = None  #: the file that it reads

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def commands() -> list[Command]:
    """Every command of the pages and of the examples' docstrings."""
    found: list[Command] = []
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            found += of_page(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            found += _in_sentences(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    return found


def of_page(page: str, text: str) -> list[Command]:
    """Commands of its shell blocks and its sentences."""
    found: list[Command] = []
    for match in _BLOCK.finditer(text):
        if match[1] in ("", "sh", "bash", "console"):
            found += _of_block(page, text.count("\n", 0, match.start(2)) + 1, match[2])
    sentences = _BLOCK.sub(lambda x: "\n" * x[0].count("\n"), text)
    return [*found, *_in_sentences(page, sentences)]


def _of_block(page: str, line: int, block: str) -> Iterator[Command]:
    lines = iter(block.split("\n"))
    for first in lines:
        begin, text = line, first
        line += 1
        while text.endswith("\\"):
            text = text[:-1] + next(lines)
            line += 1
        yield from _of_line(page, begin, text, block=True)


def _in_sentences(page: str, text: str) -> Iterator[Command]:
    for match in _CODE.finditer(text):
        code = " ".join(match[2].split())
        yield from _of_line(page, text.count("\n", 0, match.start()) + 1, code, block=False)


def _of_line(page: str, line: int, text: str, *, block: bool) -> Iterator[Command]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        if text.split(maxsplit=1)[0] in PROGRAMS:
            raise
        return
    for part in " ".join(shlex.quote(x) for x in words).split(" '&&' "):
        these = tuple(shlex.split(part))
        stdin = None
        if "<" in these:
            these, stdin = these[: these.index("<")], these[-1]
        if not these:
            continue
        named = these[0] in PROGRAMS or Path(these[0]).name in ("pip", "python")
        if named and (len(these) > 1 or these[0] == "lagkv"):
            yield Command(page, line, text, these, block, stdin)


class Parsed(BaseException):
    """Raised in place of the work, once a program has taken its arguments. No Exception, which programs catch."""


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the program takes these arguments. The working folder has what the pages speak of."""
    program, *arguments = command.words
    name = Path(program).name
    if name == "make":
        _make(arguments)
    elif name == "pip":
        _pip(arguments)
    elif name == "lagkv":
        _lagkv(command, arguments, monkeypatch)
    else:
        _python(arguments, monkeypatch)


def _make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    variables = [x.split("=", 1)[0] for x in arguments if "=" in x]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for variable in variables:
        assert f"$({variable})" in makefile, f"the Makefile has no variable {variable}"


def _pip(arguments: list[str]) -> None:
    from packaging.requirements import Requirement

    if sys.version_info < (3, 11):
        pytest.skip("reading pyproject.toml needs Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("--no-build-isolation", action="store_true")
    parser.add_argument("--no-deps", action="store_true")
    parser.add_argument("packages", nargs="+")
    for package in parser.parse_args(arguments).packages:
        if package.endswith(".whl"):  # of `make wheel`
            assert re.fullmatch(r"dist/(cuda|cpu)/lagkv_ext-\*\.whl", package), package
            continue
        # "." is a folder: the requirement is that of the project itself.
        wanted = Requirement(re.sub(r"^\.", project["name"], package))
        if wanted.name == project["name"]:
            assert wanted.extras <= set(project["optional-dependencies"]), wanted


def _lagkv(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without a model: to `load_model`; `profile` to its parser; rollout commands wholly. Where a
    sentence only names a command, it must exist."""
    from typer.testing import CliRunner

    from lagkv_ext.commands import cli, models
    from lagkv_ext.commands.demo import command as demo

    def load_model(*_: Any, **__: Any) -> NoReturn:
        raise Parsed

    # The demo is imported above: a module first imported from here on would keep this function for ever.
    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.setattr(demo, "load_model", load_model)
    try:
        with _stops_after_parsing(monkeypatch):
            given = None if command.stdin is None else Path(command.stdin).read_bytes()
            done = CliRunner().invoke(cli.app, arguments, prog_name="lagkv", input=given)
    except Parsed:
        return
    if not command.block and len(arguments) <= 1:
        done = CliRunner().invoke(cli.app, [*arguments, "--help"], prog_name="lagkv")
    assert done.exit_code == 0, done.output


def _python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] != "-m":
        path = ROOT / arguments[0]
        assert path.is_file(), path
        _run(str(path), arguments[1:], monkeypatch, module=False)
        return
    module, rest = arguments[1], arguments[2:]
    if module == "pytest":
        for word in rest:
            assert word.startswith("-") or (ROOT / word).exists(), word
    elif module == "venv":
        assert len(rest) == 1
    else:
        _run(module, rest, monkeypatch, module=True)


def _run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, module: bool) -> None:
    """To the end of the parsing with argparse; programs of `RUN` wholly."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(ROOT)
    if not module:
        monkeypatch.syspath_prepend(Path(name).parent)
    elif name not in RUN:
        source = importlib.util.find_spec(name)
        assert source is not None, f"there is no module {name}"
        program = Path(str(source.origin))
        if source.submodule_search_locations is not None:  # a package runs its __main__
            program = program.with_name("__main__.py")
        text = program.read_text(encoding="utf-8")
        if "argparse" not in text:  # it would run: a program without options, of the developers
            assert not arguments
            assert 'if __name__ == "__main__":' in text
            return
    status: object = None
    with _stops_after_parsing(monkeypatch), contextlib.redirect_stdout(io.StringIO()):
        try:
            if module:
                # What another test imported must not be what runs: runpy warns of it.
                for imported in (f"{name}.__main__", name):
                    if not hasattr(sys.modules.get(imported), "__path__"):
                        monkeypatch.delitem(sys.modules, imported, raising=False)
                runpy.run_module(name, run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(name, run_name="__main__")
        except Parsed:
            pass
        except SystemExit as end:
            status = end.code
    assert status in (0, None), f"exit status {status}"


@contextlib.contextmanager
def _stops_after_parsing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        parse(self, *given, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        yield
