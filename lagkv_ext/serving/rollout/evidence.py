"""The quality checks of one version, shared by all processes: one line each, appended, read on from the last position.

With a small share of which a small share is checked, no single process sees enough; together they do, and a
restarted one continues from what is known. Lines hold numbers alone, nothing of what users wrote.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from lagkv_ext.serving.rollout.judge import Check
from lagkv_ext.serving.rollout.policy import MAIN, flag, integer, number, read_object
from lagkv_ext.serving.rollout.store import now
from lagkv_ext.user_files import decode

_log = logging.getLogger(__name__)


class Evidence:
    """The file of one version's checks, read from its beginning."""

    def __init__(self, path: Path):
        self.path = path
        self._at = 0  # bytes read so far
        self._last = b""  # the line before that, by which the file is recognised

    def append(self, check: Check) -> None:
        """Raises OSError where it cannot be written."""
        data: dict[str, Any] = {
            "time": now(),
            "pid": os.getpid(),
            "agreement": check.agreement,
            "kl": check.kl if math.isfinite(check.kl) else None,
            "tokens": check.tokens,
            "prompt_tokens": check.prompt_tokens,
        }
        if check.variant != MAIN:
            data["variant"] = check.variant
        if check.shadow:
            data["shadow"] = True
        line = json.dumps(data).encode() + b"\n"
        self.path.parent.mkdir(exist_ok=True)
        # One write to a file opened for appending: lines of several processes do not mix.
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            # A disk that was full left a part of a line, which must not take this one with it.
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                raise OSError(f"{self.path}: a line was written in part")
        finally:
            os.close(fd)

    def new(self) -> list[Check]:
        """The checks since the last call, of all processes, in the same order for each of them.

        A file that somebody emptied or replaced is read from its beginning. Raises OSError where it cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self._at - len(self._last))
                data = file.read()
                if not data.startswith(self._last):
                    file.seek(0)
                    self._at, self._last, data = 0, b"", file.read()
        except FileNotFoundError:
            return []
        whole = data[len(self._last) : data.rfind(b"\n") + 1]
        if not whole:
            return []
        self._at += len(whole)
        self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        found = []
        for line in whole.splitlines():
            if not line.strip():
                continue
            try:
                found.append(_check_of(line))
            except (ValueError, KeyError) as error:
                _log.error("a line of %s is no check and is left out: %s", self.path, error)
        return found


def _check_of(line: bytes) -> Check:
    data = read_object(decode(line, "the line"), "the line")
    kl, variant, shadow = data["kl"], data.get("variant", MAIN), data.get("shadow", False)
    number("agreement", data["agreement"], 0, 1)
    if kl is not None:
        number("kl", kl, 0, 1e38)
    integer("tokens", data["tokens"], 1)
    integer("prompt_tokens", data["prompt_tokens"], 1)
    flag("shadow", shadow)
    if not isinstance(variant, str):
        raise ValueError(f"variant must be a name, got {variant!r}")
    return Check(
        data["agreement"],
        math.inf if kl is None else kl,
        data["tokens"],
        data["prompt_tokens"],
        variant=variant,
        shadow=shadow,
    )
