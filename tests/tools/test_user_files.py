"""Every file that a user writes may begin with a byte-order mark and end its lines in any way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")
pytest.importorskip("numpy", reason="the evaluation needs numpy")

from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import read_settings
from lagkv_ext.commands.demo import facts as demo_facts
from lagkv_ext.commands.evaluate.tasks import files
from lagkv_ext.serving.rollout import Store
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.user_files import decode, parse_object
from tests.serving.rollout_cases import policy

MARK = b"\xef\xbb\xbf"
CHECK = {"agreement": 1, "kl": 0.5, "tokens": 1, "prompt_tokens": 1}
FACTS = [{"question": "The code is", "answer": "40817"}]
PROMPT = {"context": "A text.\n", "question": "What?", "answers": ["this"]}


def facts(path: Path) -> Any:
    text = path.with_name("text.txt")
    text.write_bytes(path.read_bytes())
    return demo_facts.read_files(text, path)


def prompts(path: Path) -> Any:
    return list(files._jsonl(path, []))


#: Readers of files, and what a user writes there.
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "settings": (read_settings, '{\n"lag_size": 8,\n"keep_ratio": 0.25\n}\n'),
    "rollout": (lambda path: Store(path).current(), policy().text),
    "trip": (
        lambda path: Store(path.with_name("a.json")).trip(),
        json.dumps({"version": 1, "reason": "why", "time": "now", "pid": 1}, indent=2),
    ),
    "evidence": (lambda path: Evidence(path).new(), json.dumps(CHECK) + "\n" + json.dumps(CHECK) + "\n"),
    "facts": (facts, json.dumps(FACTS, indent=2)),
    "templates": (files.read_templates, json.dumps({"qasper": "Read {context}\nSay {input}"}, indent=2)),
    "prompts": (prompts, json.dumps(PROMPT) + "\n" + json.dumps(PROMPT) + "\n"),
    "text": (lambda path: files._text(path, []), "Line one.\nLine two.\n"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_mark_and_line_breaks_change_nothing(tmp_path, caplog, reader, mark, line_break):
    read, text = READERS[reader]
    path = tmp_path / ("a.tripped.json" if reader == "trip" else "a.json")
    path.write_text(text, newline="")
    wanted = read(path)
    assert wanted
    path.write_bytes(mark + text.replace("\n", line_break).encode())
    assert read(path) == wanted
    assert not caplog.records


@pytest.mark.parametrize("reader", ["settings", "rollout", "trip", "facts", "templates"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_what_an_editor_saved_as_utf_16_is_named(tmp_path, reader, encoding):
    read, text = READERS[reader]
    path = tmp_path / ("a.tripped.json" if reader == "trip" else "a.json")
    path.write_bytes(("\ufeff" + text).encode(encoding))
    with pytest.raises(Exception, match=r"not UTF-8 but UTF-16, .*: save it as UTF-8"):
        read(path)


@given(st.text(), st.booleans())
def test_decode_is_the_text_without_its_mark(text, mark):
    wanted = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert decode((MARK if mark else b"") + text.encode("utf-8", "replace"), "it") == (
        wanted if not mark else text.replace("\r\n", "\n").replace("\r", "\n")
    )


def test_settings_in_which_something_is_ambiguous_are_refused(tmp_path):
    """The last of two names would win without a word."""
    path = tmp_path / "lagkv.json"
    for text, message in (
        ('{"keep_ratio": 0.5, "keep_ratio": 0.25}', "has the name 'keep_ratio' twice"),
        ('{"layer_keep_ratio": {"1": 0.5, "1": 0.25}}', "has the name '1' twice"),
        ('{"value_weight": NaN}', "must have finite numbers, got NaN"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            read_settings(path)
        assert str(error.value).startswith(f"the settings file {path} {message}")


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_any_object_is_parsed_as_it_was_written(data):
    assert parse_object(json.dumps(data), "it") == data
