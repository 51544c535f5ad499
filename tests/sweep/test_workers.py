"""Processes of the sweep: results come through, and a process that hangs, fails or grows is reported."""

from __future__ import annotations

import time

import pytest

from tests.sweep import workers


def work(name: str) -> dict[str, str]:
    if name == "hangs":
        time.sleep(60)
    elif name == "fails":
        raise KeyError(name)
    elif name == "grows":
        bytearray((workers.GIBIBYTES + 1) << 30)
    elif name == "large":
        return {name: name * 100_000}  # more than a pipe holds
    return {"name": name}


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_process_is_reported(capfd, jobs):
    names = ["a", "fails", "large", "hangs", "grows", "b"]
    began = time.monotonic()
    results = dict(workers.run(names, work, jobs, seconds=2))
    assert time.monotonic() - began < 30
    assert results == {
        "a": {"name": "a"},
        "b": {"name": "b"},
        "large": {"large": "large" * 100_000},
        "fails": "its process ended with status 1: KeyError: 'fails'",
        "grows": "its process ended with status 1: MemoryError: ",
        "hangs": "not done after 2 s",
    }
    assert {name for name, x in results.items() if isinstance(x, workers.Failure)} == {
        "fails",
        "grows",
        "hangs",
    }
