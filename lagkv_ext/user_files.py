"""Reads files that people write: UTF-8 with or without a byte-order mark, and JSON objects without ambiguity."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes, source: str) -> str:
    """The text of a file's bytes, without a byte-order mark and with ``\\n`` as line break.

    Raises ValueError: ``data`` is not UTF-8. ``source`` names the file in the message.
    """
    if data.startswith(_UTF16):
        raise ValueError(
            f"{source} is not UTF-8 but UTF-16, as some editors and shells write: save it as UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path, source: str) -> str:
    """The text of a file (`decode`). Raises OSError and ValueError."""
    return decode(Path(path).read_bytes(), source)


def parse_object(text: str, source: str) -> dict[str, Any]:
    """A JSON object in which nothing is ambiguous: no name twice, no NaN, no infinity.

    Raises ValueError; ``source`` names the text in the message.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
            raise _Ambiguous(f"{source} has the name {twice!r} twice")
        return found

    def refuse(constant: str) -> Any:
        raise _Ambiguous(f"{source} must have finite numbers, got {constant}")

    try:
        data = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except _Ambiguous as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{source} must have a JSON object, got {type(data).__name__}")
    return data


class _Ambiguous(Exception):
    """Keeps these messages apart from the parser's own errors."""
