"""Output of the steps, in one file of bounded size."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = 16 << 10  # bytes kept of a step's beginning
TAIL = 40 << 10  # and of its end


class Log:
    """Appends output as it comes. Of a step that prints much, its beginning and its end stay."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._start = 0

    def begin(self, title: str) -> None:
        """A step begins."""
        self._file.seek(0, 2)
        self._file.write(f"\n{title}\n".encode())
        self._start = self._file.tell()

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        if self._file.tell() - self._start > HEAD + 4 * TAIL:
            self._shorten()

    def find(self, pattern: str) -> str:
        """The step's first line that matches, or an empty string."""
        found = (line for line in self._text().splitlines() if re.search(pattern, line))
        return next(found, "").strip()

    def end(self) -> list[str]:
        """The step has ended; its last lines."""
        self._shorten()
        return self._text().strip().splitlines()[-25:]

    def _text(self) -> str:
        self._file.seek(self._start)
        return self._file.read().decode(errors="replace")

    def _shorten(self) -> None:
        self._file.seek(self._start)
        part = self._file.read()
        if len(part) > HEAD + TAIL:
            self._file.seek(self._start + HEAD)
            self._file.truncate()
            left_out = len(part) - HEAD - TAIL
            self._file.write(f"\n[... {left_out} bytes left out ...]\n".encode() + part[-TAIL:])
        self._file.seek(0, 2)
