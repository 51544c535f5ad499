"""Work of other processes on a rollout file, started at one moment."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lagkv_ext.serving.rollout import Check, Store, Trip
from lagkv_ext.serving.rollout.evidence import Evidence

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lagkv_ext.serving.rollout"])  # torch is imported once, not in every process


def at_once(path: Path, *work: tuple[Callable[..., Any], Any]) -> list[Any]:
    """Results of ``function(path, argument)``, each in a process of its own, all begun together."""
    go = path.with_name("go")
    with ProcessPoolExecutor(len(work), mp_context=CONTEXT) as pool:
        futures = [pool.submit(_when, go, function, path, argument) for function, argument in work]
        go.touch()
        done = [future.result(timeout=120) for future in futures]
    go.unlink()
    return done


def kill_while(path: Path, function: Callable[..., Any], argument: Any, *, after: float) -> None:
    """Begin ``function(path, argument)`` in a process, and kill it (SIGKILL) some seconds after its first write."""
    process = CONTEXT.Process(target=function, args=(path, argument))
    before = path.stat().st_ino
    process.start()
    while path.stat().st_ino == before and process.is_alive():
        time.sleep(0.0001)
    time.sleep(after)
    process.kill()
    process.join()
    assert process.exitcode == -9


def _when(go: Path, function: Callable[..., Any], path: Path, argument: Any) -> Any:
    while not go.exists():
        time.sleep(0.001)
    return function(path, argument)


def count_up(path: Path, times: int) -> None:
    """Each version needs the one before it: a lost one shows."""
    for _ in range(times):
        Store(path).write(lambda old: dataclasses.replace(old, min_prompt_tokens=old.min_prompt_tokens + 1))


def read_until(path: Path, last: int) -> int:
    """Read the file as fast as can be until a version; every read is whole, and no version is below the one before."""
    seen = reads = 0
    while seen < last:
        version = json.loads(path.read_text())["version"]
        assert version >= seen, (version, seen)
        seen, reads = version, reads + 1
    return reads


def trip(path: Path, me: int) -> int:
    """Whose record stands."""
    return Store(path).record_trip(Trip(1, f"process {me}", "now", me)).pid


def add_checks(path: Path, me: int) -> None:
    evidence = Evidence(Store(path).checks_of(1))
    for i in range(100):
        evidence.append(Check(0.5, i, me, 1))


def settle(path: Path, _: int) -> int:
    """Starts a server, and returns the version that it sees then."""
    from lagkv_ext.serving.rollout import Rollout
    from tests.cache.models import tiny_config

    rollout = Rollout(path, tiny_config("llama"), reload_s=0)
    while (version := rollout.status().version) == 1:  # another one holds the lock
        time.sleep(0.01)
    return version


def add_samples(path: Path, me: int) -> int:
    """Counts how many of five were taken in."""
    from lagkv_ext.serving.rollout.samples import Sample, SampleFolder

    store = Store(path)
    folder = SampleFolder(store, store.current().samples)
    made = Sample("now", 1, "lagkv", {}, f"prompt of {me}", "a", "b", 1)
    return sum(folder.add(made) is not None for _ in range(5))
