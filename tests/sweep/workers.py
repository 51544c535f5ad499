"""A process for every family, with limits of time and memory: one that hangs or grows is reported, not waited for."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS, GIBIBYTES = 300, 8


def run(
    names: list[str], work: Callable[[str], Any], jobs: int, seconds: float = SECONDS
) -> Iterator[tuple[str, Any]]:
    """``(name, work(name))`` as they finish, through JSON; for a process that did not, ``(name, Failure)``.

    The processes are copies of this one, so that each has what was imported without importing it.
    """
    waiting, running = list(reversed(names)), {}
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                process, pipe = _start(name, work)
                running[pipe] = (name, process, time.monotonic() + seconds, [])
                selector.register(pipe, selectors.EVENT_READ)
            next_end = min(end for _, _, end, _ in running.values())
            for key, _ in selector.select(max(next_end - time.monotonic(), 0)):
                part = os.read(key.fd, 1 << 16)
                name, process, _, parts = running[key.fd]
                if part:
                    parts.append(part)
                else:
                    yield name, _finish(selector, running, key.fd, None)
            for pipe in [p for p, x in running.items() if x[2] < time.monotonic()]:
                yield running[pipe][0], _finish(selector, running, pipe, f"not done after {seconds:g} s")


class Failure(str):
    """Why a process gave no result."""


def _start(name: str, work: Callable[[str], Any]) -> tuple[int, int]:
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    status = 1
    try:
        os.close(read)
        limit = GIBIBYTES << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with os.fdopen(write, "w") as pipe:
            try:
                text, status = json.dumps(work(name)), 0
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            pipe.write(text)
    finally:
        os._exit(status)


def _finish(selector: Any, running: dict[int, Any], pipe: int, problem: str | None) -> Any:
    _, process, _, parts = running.pop(pipe)
    selector.unregister(pipe)
    os.close(pipe)
    if problem:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = b"".join(parts).decode()
    if problem or status:
        return Failure(problem or f"its process ended with status {status}: {text[:300]}")
    return json.loads(text)
