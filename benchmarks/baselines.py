"""The operators to measure and their baselines, all on the same buffers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from lagkv_ext import ops, reference
from lagkv_ext.commands.traffic import Problem

ISA_VARIABLE = "LAGKV_CPU_ISA"
WORKER = Path(__file__).with_name("kvpress_worker.py")
assert ops  # defines torch.ops.lagkv


class Skipped(Exception):
    """A contender that cannot run here; the message says why."""


class Buffers:
    """The memory of one case. Contenders read ``key`` and ``value``; ``restore`` makes them as they were."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.problem = case.problem
        self.pristine_key, self.pristine_value = case.problem.make(case.device, seed)
        self.key, self.value = self.pristine_key.clone(), self.pristine_value.clone()
        self.key_copy, self.value_copy = torch.empty_like(self.key), torch.empty_like(self.value)

    def restore(self) -> None:
        self.key.copy_(self.pristine_key)
        self.value.copy_(self.pristine_value)


@dataclass(frozen=True)
class Contender:
    """One line of a table. ``check`` tells what its result has to be: "compressed", "copied" or "kvpress"."""

    name: str
    what: str
    run: Callable[[Buffers], Any]
    moves: str  # the operator whose least bytes it should move
    check: str = "compressed"
    times_itself: bool = False
    close: Callable[[], None] = lambda: None


def contenders(case: Case, *, kvpress_python: str | None = None) -> dict[str, Callable[[], Contender]]:
    """Every contender by name, made when called: that may compile or start a process, or raise Skipped."""
    p = case.problem
    arguments = (p.start, p.lag_size, p.keep)
    scoring = p.scoring

    def in_place(b: Buffers) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.ops.lagkv.compress_(b.key, b.value, *arguments, **scoring)
        return b.key[:, :, : p.rows], b.value[:, :, : p.rows], index

    def at_level(level: str) -> Callable[[], Contender]:
        def make() -> Contender:
            if case.device != "cpu":
                raise Skipped("instruction sets are the CPU's")
            try:
                with cpu_isa(level):
                    torch.ops.lagkv._cpu_isa()
            except RuntimeError as error:
                raise Skipped(str(error).splitlines()[0]) from error
            return Contender(f"compress_-{level}", f"compress_ with {ISA_VARIABLE}={level}", run, "compress_")

        def run(b: Buffers) -> tuple[Tensor, Tensor, Tensor]:
            with cpu_isa(level):
                return in_place(b)

        return make

    def compress(b: Buffers) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.lagkv.compress(b.key, b.value, *arguments, **scoring)

    def eager(b: Buffers) -> tuple[Tensor, Tensor, Tensor]:
        return reference.compress(b.key, b.value, *arguments, **scoring)

    def compiled() -> Contender:
        function = torch.compile(
            lambda key, value: reference.compress(key, value, *arguments, **scoring), dynamic=False
        )
        return Contender(
            "compiled", "the reference under torch.compile", lambda b: function(b.key, b.value), "compress"
        )

    def compiled_topk() -> Contender:
        function = torch.compile(plain_compress(p), dynamic=False, fullgraph=True)
        what = "the reference under torch.compile, without its checks and its rule for ties"
        return Contender("compiled-topk", what, lambda b: function(b.key, b.value), "compress")

    def copy(b: Buffers) -> tuple[Tensor, Tensor]:
        return b.key_copy.copy_(b.key), b.value_copy.copy_(b.value)

    def clone(b: Buffers) -> tuple[Tensor, Tensor]:
        return b.key.clone(), b.value.clone()

    def of(
        name: str, what: str, run: Callable[[Buffers], Any], moves: str, check: str = "compressed"
    ) -> Callable:
        return lambda: Contender(name, what, run, moves, check)

    return {
        "compress_": of("compress_", "torch.ops.lagkv.compress_, in place", in_place, "compress_"),
        "compress": of("compress", "torch.ops.lagkv.compress", compress, "compress"),
        "compress_-avx2": at_level("avx2"),
        "compress_-portable": at_level("portable"),
        "copy": of("copy", "copying key and value into existing buffers", copy, "copy", "copied"),
        "clone": of("clone", "key.clone(), value.clone()", clone, "copy", "copied"),
        "compiled": compiled,
        "compiled-topk": compiled_topk,
        "eager": of("eager", "lagkv_ext.reference.compress", eager, "compress"),
        "kvpress": lambda: kvpress(case, kvpress_python),
    }


@contextlib.contextmanager
def cpu_isa(level: str) -> Iterator[None]:
    """The CPU kernels at one instruction set; they look at the variable at every call."""
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[ISA_VARIABLE]
        else:
            os.environ[ISA_VARIABLE] = before


def plain_compress(p: Problem) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The method as one would write it for torch.compile: no checks, ``topk``, no rule for ties, one gather."""
    score_of = {"std": reference._std_score, "cosine": reference._cosine_score}[p.score]

    def compress(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tiles = (reference._partitions(x, p.start, p.lag_size) for x in (key, value))
        key_score, value_score = (score_of(tile) for tile in tiles)
        best = (key_score + p.value_weight * value_score).topk(p.keep, dim=-1, sorted=False).indices
        kept = best.sort(dim=-1).values.to(torch.int32)
        index = reference._kept_index(kept, key.shape[2], p.start, p.lag_size)
        rows = index.long().unsqueeze(-1)
        return (
            key.gather(2, rows.expand(-1, -1, -1, key.shape[3])),
            value.gather(2, rows.expand(-1, -1, -1, value.shape[3])),
            index,
        )

    return compress


def kvpress(case: Case, python: str | None) -> Contender:
    """LagKVPress in a process under ``python``, on its own copy of the same values."""
    if python is None:
        if importlib.util.find_spec("kvpress") is None:
            raise Skipped(
                "kvpress is not installed in this interpreter; --kvpress-python names one that has it"
            )
        python = sys.executable
    p = case.problem
    if p.score != "std" or p.value_weight != 1:
        raise Skipped(
            f"kvpress has the score std with value_weight 1 only, not {p.score} with {p.value_weight:g}"
        )
    if p.compressed == 0:
        raise Skipped("nothing is compressed at this length")
    if p.key_dim != p.value_dim:
        raise Skipped("kvpress needs equal head dims of key and value")
    worker = KvpressWorker(python)
    try:
        key, value = p.make(case.device)
        facts = worker.load(key, value, case, p)
    except Skipped:
        worker.close()
        raise
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return Contender(
        "kvpress",
        f"LagKVPress.compress ({versions}), on a copy of the same values",
        lambda b: worker.ask(do="run")["seconds"],
        "compress",
        check="kvpress",
        times_itself=True,
        close=worker.close,
    )


class KvpressWorker:
    """The other end of ``kvpress_worker.py``."""

    last: KvpressWorker | None = None  # verify asks the running one for its index

    def __init__(self, python: str) -> None:
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise Skipped(f"{python} cannot be started: {error.strerror}") from error
        self._folder = tempfile.TemporaryDirectory(prefix="lagkv-kvpress-")
        KvpressWorker.last = self

    def load(self, key: Tensor, value: Tensor, case: Case, p: Problem) -> dict:
        path = Path(self._folder.name) / "inputs.pt"
        torch.save({"key": key, "value": value}, path)
        facts = self.ask(
            do="load",
            path=str(path),
            device=case.device,
            threads=case.threads,
            start=p.start,
            lag_size=p.lag_size,
            rows=p.rows,
        )
        path.unlink()
        return facts

    def result(self) -> tuple[Tensor, Tensor]:
        """Kept positions ``[B, H, N']`` in kvpress's order, and the keys at them."""
        path = Path(self._folder.name) / "index.pt"
        self.ask(do="index", path=str(path))
        data = torch.load(path)
        path.unlink()
        return data["index"], data["key"]

    def ask(self, **command: Any) -> dict:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            process.wait(timeout=10)
            lines = process.stderr.read().strip().splitlines()
            raise Skipped(
                f"kvpress's process ended with {process.returncode}: {lines[-1] if lines else 'no message'}"
            )
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate(timeout=30)  # closes its input, which ends it
        self._folder.cleanup()
        if KvpressWorker.last is self:
            KvpressWorker.last = None
