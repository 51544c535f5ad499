"""results.jsonl: written line by line, so that what was measured survives an interruption, a kill and a full disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lagkv_ext.commands.evaluate.types import EvaluationError

FORMAT = 1
# Must be the same for two runs to be comparable line by line.
IDENTITY = ("format", "model", "weights", "dtype", "seed")


class Results:
    """The lines of a results file. Opening it takes up what an earlier run left: a torn last line is cut off."""

    def __init__(self, path: Path, header: dict[str, Any], *, fresh: bool = False):
        self.path = path
        self.header = {"kind": "run", "format": FORMAT, **header}
        self.records: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        try:
            self._take_up(fresh)
        except BaseException:
            self._file.close()
            raise

    def _take_up(self, fresh: bool) -> None:
        try:
            # Released by the system when the file is closed or its process dies.
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"another run is writing to {self.path}: wait for it, or give another --out"
            ) from None
        whole, lines = (0, []) if fresh else _read(self.path)
        for run in (x for x in lines if x.get("kind") == "run"):
            for name in IDENTITY:
                if run.get(name) != self.header.get(name):
                    raise EvaluationError(
                        f"{self.path} holds results with {name} {run.get(name)!r}, and this run has "
                        f"{self.header.get(name)!r}: give another --out, or --fresh to begin anew"
                    )
        self.records = [x for x in lines if x.get("kind") != "run"]
        self._file.truncate(whole)
        self._file.seek(whole)
        self._append(self.header)

    def done(self) -> set[tuple[str, str, str, str]]:
        """Keys of what is there already (`key`)."""
        return {key(x) for x in self.records if x["kind"] in ("result", "skipped")}

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; on a full disk the file is unchanged, and EvaluationError is raised."""
        self._append(record)
        self.records.append(record)

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        end = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self._file.truncate(end)
            self._file.seek(end)
            raise EvaluationError(
                f"the disk of {self.path} is full; the results so far are kept there: make room "
                f"and run the same command again"
            ) from error

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def key(record: dict[str, Any]) -> tuple[str, str, str, str]:
    return record["task"], record["sample"], record["digest"], record["setting_name"]


def load(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Headers and records of a results file.

    Raises EvaluationError: no such file, or no results in it.
    """
    try:
        _, lines = _read(path)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from error
    headers = [x for x in lines if x.get("kind") == "run"]
    if not headers:
        raise EvaluationError(f"{path} holds no results of lagkv evaluate")
    return headers, [x for x in lines if x.get("kind") != "run"]


def _read(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Length of the whole lines in bytes, and these lines."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    return whole, list(_lines(data[:whole], path))


def _lines(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"line {number} of {path} is no JSON: it was not written by lagkv evaluate"
            ) from error
        if not isinstance(record, dict) or "kind" not in record:
            raise EvaluationError(f"line {number} of {path} is no result of lagkv evaluate")
        yield record
