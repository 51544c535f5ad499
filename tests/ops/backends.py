"""The operators behind one face for every backend, so that one suite drives them all.

``reference`` is plain PyTorch (it tests the tests), ``cpu-*`` the C++ kernels at each instruction set, ``simt`` the
CUDA kernels in the executor, ``cuda`` the CUDA kernels on a card.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lagkv_ext import reference

OPERATORS = (
    "compress",
    "compress_carried",
    "compress_",
    "partition_bounds",
    "lag_score",
    "topk_index",
    "compact",
)
ISA_VARIABLE = "LAGKV_CPU_ISA"
# Instructions that the kernels of each level may use; the names are those of /proc/cpuinfo.
ISA_FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


class Backend:
    """One implementation of the operators, with the signatures of the schema.

    Memory that an operator allocates and does not write shows as NaN, or as the largest integer.
    """

    def __init__(self, name: str, operators: Any, device: str = "cpu", isa: str | None = None) -> None:
        self.name = name
        self.device = torch.device(device)
        self.isa = isa
        self._operators = operators

    def __repr__(self) -> str:
        return f"Backend({self.name})"

    @property
    def is_kernel(self) -> bool:
        return self.name != "reference"

    @property
    def is_registered(self) -> bool:
        """Reached through torch's dispatcher: autograd and tracing are there too."""
        return self.isa is not None or self.device.type == "cuda"

    @property
    def sums_by_alignment(self) -> bool:
        """The CUDA kernels: the width of a load follows the alignment, and the order of a sum the width."""
        return self.name == "simt" or self.device.type == "cuda"

    @property
    def runs_on_device(self) -> bool:
        """The CUDA kernels: values are only seen by a kernel, which cannot raise."""
        return self.name == "simt" or self.device.type == "cuda"

    @property
    def is_slow(self) -> bool:
        """Executes thread by thread: large shapes are scaled down."""
        return self.name == "simt"

    def compress(self, key, value, start, lag_size, keep, **scoring):
        return self._call("compress", key, value, start, lag_size, keep, **scoring)

    def compress_carried(self, key, value, carried, start, lag_size, keep, **scoring):
        return self._call("compress_carried", key, value, carried, start, lag_size, keep, **scoring)

    def compress_(self, key, value, start, lag_size, keep, **scoring):
        return self._call("compress_", key, value, start, lag_size, keep, **scoring)

    def partition_bounds(self, x, start, lag_size):
        return self._call("partition_bounds", x, start, lag_size)

    def lag_score(self, key, value, start, lag_size, **scoring):
        return self._call("lag_score", key, value, start, lag_size, **scoring)

    def topk_index(self, score, keep):
        return self._call("topk_index", score, keep)

    def compact(self, x, index):
        return self._call("compact", x, index)

    def compress_ragged_(self, key, value, start, length, lag_size, keep, **scoring):
        return self._call("compress_ragged_", key, value, start, length, lag_size, keep, **scoring)

    def compress_varlen(self, key, value, cu_seqlens, start, lag_size, keep, **scoring):
        return self._call("compress_varlen", key, value, cu_seqlens, start, lag_size, keep, **scoring)

    def compress_paged_(self, key_cache, value_cache, block_table, start, length, lag_size, keep, **scoring):
        return self._call(
            "compress_paged_", key_cache, value_cache, block_table, start, length, lag_size, keep, **scoring
        )

    def compress_blocks(
        self, key_cache, value_cache, source, target, m_before, m_after, sink_size, lag_size, keep, **scoring
    ):
        tensors = key_cache, value_cache, source, target, m_before, m_after
        return self._call("compress_blocks", *tensors, sink_size, lag_size, keep, **scoring)

    def _call(self, operator: str, *args, **kwargs):
        with cpu_isa(self.isa), poisoned_allocations():
            return getattr(self._operators, operator)(*args, **kwargs)


@contextlib.contextmanager
def cpu_isa(level: str | None) -> Iterator[None]:
    """The CPU kernels' instruction set, read by them at every call; None leaves the choice to them."""
    if level is None:
        yield
        return
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ[ISA_VARIABLE]
        else:
            os.environ[ISA_VARIABLE] = before


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty fills with NaN (integers: the maximum), so that a row nobody wrote is seen."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def machine_has(level: str) -> bool:
    if not ISA_FLAGS[level]:
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return ISA_FLAGS[level] <= set(line.split(":")[1].split())
    return False


class Unavailable(Exception):
    """A backend that cannot run here; the message says why."""


def make_reference() -> Backend:
    return Backend("reference", reference)


def make_cpu(level: str) -> Backend:
    if not machine_has(level):
        raise Unavailable(f"this CPU lacks {', '.join(sorted(ISA_FLAGS[level]))}")
    with cpu_isa(level):
        running = torch.ops.lagkv._cpu_isa()
    assert running == level, f"{ISA_VARIABLE}={level} on a CPU that has it runs {running!r}"
    return Backend(f"cpu-{level}", torch.ops.lagkv, isa=level)


def make_simt() -> Backend:
    from tests import simt
    from tests.simt import operators

    try:
        simt.module()  # builds it; a kernel that does not compile is another error
    except simt.Unavailable as error:
        raise Unavailable(f"the SIMT executor cannot be built: {error}") from error
    return Backend("simt", operators)


def make_cuda() -> Backend:
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} has no CUDA")
    if not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device")
    return Backend("cuda", torch.ops.lagkv, device="cuda")


FACTORIES = {
    "reference": make_reference,
    "cpu-portable": lambda: make_cpu("portable"),
    "cpu-avx2": lambda: make_cpu("avx2"),
    "cpu-avx512": lambda: make_cpu("avx512"),
    "simt": make_simt,
    "cuda": make_cuda,
}
KERNELS = tuple(name for name in FACTORIES if name != "reference")
REGISTERED = tuple(name for name in KERNELS if name != "simt")
