"""Measures the speed of the executor: ``python -m tests.simt.speed``. Processor time, one core."""

from __future__ import annotations

import time

import numpy as np

from tests import simt

BLOCKS, THREADS = 64, 256


def measure(kernel: str, turns: int, **session) -> tuple[float, dict]:
    """Seconds, and what was counted."""
    x = np.arange(BLOCKS * THREADS, dtype=np.float32)
    run = simt.Session(**session)
    begin = time.process_time()
    getattr(simt.module().samples, kernel)(
        *(run, simt.tensor(x), simt.tensor(np.empty_like(x))), grid=[BLOCKS], block=[THREADS], option=turns
    )
    return time.process_time() - begin, run.counts()


def main() -> None:
    for order in ("forward", "random"):
        seconds, counts = measure("many_shuffles", 1000, order=order)
        print(f"{order:8} {counts['switches'] / seconds / 1e6:6.1f} million switches of fibres per second")
    for session in ({}, {"count": False}, {"detect": False}, {"detect": False, "count": False}):
        seconds, _ = measure("many_reads", 500, **session)
        rate = BLOCKS * THREADS * 501 / seconds / 1e6
        what = ", ".join(f"{name}={value}" for name, value in session.items()) or "detect and count"
        print(f"{rate:15.1f} million accesses to global memory per second ({what})")


if __name__ == "__main__":
    main()
