"""Runs steps one after another, each within its share of the time that is left, and keeps what ran.

The record is written before and after every step and the log as output comes, so a kill at any moment loses nothing
that was measured. A step that fails, hangs or cannot run does not stop the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tools.gpu_check.log import Log
from tools.gpu_check.record import Counts, Record

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 3.0  # between SIGTERM and SIGKILL
PASSED, FAILED, STOPPED, NOT_RUN = "passed", "FAILED", "stopped", "not run"


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    ``share``: of the time left when the step starts, against the shares of the steps that follow: time that a step does
    not use goes to the later ones. ``least_s``: with less time than this it is not started.
    """

    name: str
    command: tuple[str, ...]
    share: float
    least_s: float = 5.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    until_the_end: bool = (
        False  #: takes all the time there is: stopped without a failure, it has done its work
    )
    absent: str = ""  #: why it cannot run here
    refusal: str = ""  #: pattern of a line that says that this machine does not let the tool work
    fault: str = (
        ""  #: pattern of a line that is a failure whatever the exit status, also of a step that was stopped
    )
    tests: Path | None = None  #: file of ``progress.py``

    def shown(self) -> str:
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        words = (word.replace(sys.executable, "python").replace(f"{ROOT}/", "") for word in self.command)
        return shlex.join([*settings, *words])


@dataclasses.dataclass(frozen=True)
class Outcome:
    verdict: str
    seconds: float
    exit_status: int | None
    tail: list[str]
    reason: str = ""
    tests: Counts | None = None


def limit_s(left_s: float, shares: Sequence[float]) -> float:
    """Seconds for the first of these steps."""
    return left_s * shares[0] / sum(shares)


def end_on_sigterm() -> None:
    """Let SIGTERM end the running step too, as an interrupt from the keyboard does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run_all(steps: Sequence[Step], seconds: float, record: Record, log: Log) -> bool:
    """Run every step that fits into ``seconds``; True where all of them ran and none failed."""
    end = time.monotonic() + seconds
    for step in steps:
        record.not_run(step.name, step.absent or "not reached")
    record.save()
    waiting = [step for step in steps if not step.absent]
    good = len(waiting) == len(steps)
    while waiting:
        step = waiting[0]
        limit = limit_s(max(0.0, end - time.monotonic()), [x.share for x in waiting])
        waiting.pop(0)
        if limit < step.least_s:
            record.not_run(
                step.name, f"needs {step.least_s:.0f} s at least, its share of the rest is {limit:.0f} s"
            )
            record.save()
            good = False
            continue
        print(f"== {step.name} (at most {limit:.0f} s): {step.shown()}", flush=True)
        record.begins(step.name, step.shown(), limit)
        record.save()
        outcome = run(step, limit, log)
        record.ended(step.name, step.shown(), limit, outcome)
        record.save()
        good &= outcome.verdict == PASSED or (outcome.verdict == STOPPED and step.until_the_end)
        about = f": {outcome.reason}" if outcome.reason else ""
        print("\n".join(outcome.tail[-3:]))
        print(f"   {outcome.verdict} after {outcome.seconds:.0f} s{about}", flush=True)
    return good


def run(step: Step, limit: float, log: Log) -> Outcome:
    """Run one step in a process group of its own, which is killed at the limit."""
    if step.tests is not None:
        step.tests.unlink(missing_ok=True)
    begin = time.monotonic()
    log.begin(f"== {step.name}: {step.shown()}")
    exit_status, stopped = None, False
    process = reader = None
    try:
        with _signals_later():
            process = _start(step)
        assert process.stdout is not None
        # The command writes into a pipe: where this process is killed, the command's next line ends it too.
        reader = threading.Thread(target=_drain, args=(process.stdout, log), daemon=True)
        reader.start()
        exit_status = process.wait(max(0.0, limit - GRACE_S))
    except OSError as error:
        log.write(f"{error}\n".encode())
        return Outcome(FAILED, 0.0, None, log.end(), reason=str(error))
    except subprocess.TimeoutExpired:
        stopped = True
    finally:
        if process is not None:
            _end_group(process)
        if reader is not None:
            reader.join(GRACE_S)
    return _judge(step, exit_status, stopped, time.monotonic() - begin, log)


def _start(step: Step) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Hold back what ends this process: a step that has started and is not yet watched would outlive it."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _judge(step: Step, exit_status: int | None, stopped: bool, seconds: float, log: Log) -> Outcome:
    fault = log.find(step.fault) if step.fault else ""
    refusal = log.find(step.refusal) if step.refusal else ""
    tail = log.end()
    tests = Counts.read(step.tests) if step.tests is not None else None
    if step.tests is not None:
        step.tests.unlink(missing_ok=True)

    def outcome(verdict: str, reason: str = "") -> Outcome:
        return Outcome(verdict, seconds, exit_status, tail, reason, tests)

    if fault:
        return outcome(FAILED, fault)
    if tests is not None and tests.failed:
        return outcome(FAILED, f"{tests.failed} tests failed")
    if stopped:
        return outcome(STOPPED, "at its limit; what it had done is kept")
    if exit_status == 0:
        return outcome(PASSED)
    if refusal:
        return outcome(NOT_RUN, refusal)
    return outcome(FAILED, f"exit status {exit_status}")


def _drain(stream: IO[bytes], log: Log) -> None:
    while chunk := os.read(stream.fileno(), 1 << 16):
        log.write(chunk)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Leave no process of the step behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
