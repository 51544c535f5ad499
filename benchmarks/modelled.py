"""The CUDA kernels' memory traffic where there is no GPU: counted by the SIMT executor of ``tests/simt``.

It is a model and says so: the very kernels run thread by thread on the CPU, and every access is counted, but nothing
is known of time. A small problem stands for the large one: one head, and as many partitions per block as the launch
planner gives the large problem on the device that is assumed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lagkv_ext.commands.traffic import Problem

_ROOT = Path(__file__).resolve().parents[1]
# An H100 SXM's multiprocessors and shared memory: they decide how many partitions a block takes, nothing else here.
DEVICE = {"multiprocessors": 132, "shared_per_multiprocessor": 228 * 1024}
_SECTOR = 32
_BUILT = _ROOT / "build" / "simt"


def traffic(problem: Problem, *, build: bool) -> dict[str, Any]:
    """Bytes moved by ``compress`` and ``compress_`` over the least, or ``{"reason": why they are not known}``.

    ``build``: compile the executor where it was never built, which takes minutes.
    """
    try:
        if not build and not list(_BUILT.glob("**/lagkv_simt*.so")):
            return {"reason": "the executor is not built yet; --model-cuda builds it once, in minutes"}
        simt, operators = _executor()
    except (ImportError, RuntimeError) as error:
        return {"reason": str(error).strip().splitlines()[0]}
    if problem.compressed == 0:
        return {"reason": "nothing is compressed at this length"}
    module = simt.module()
    run = _plan(module, problem, module.Device(**DEVICE))["run"]
    # One multiprocessor, and as many runs as make the planner choose that length for the small problem too.
    device = {**DEVICE, "multiprocessors": 1}
    for runs in range(1, 9):
        small = _small(problem, runs=runs, run=run)
        if _plan(module, small, module.Device(**device))["run"] == run:
            break
    else:
        return {
            "reason": f"no launch of a small problem takes {run} partitions per block as the large one does"
        }
    result: dict[str, Any] = {
        "how": f"executor on 1 head, {small.tokens} tokens, {run} partitions per block as planned for "
        f"{DEVICE['multiprocessors']} multiprocessors",
        "partitions_per_block": run,
        "operators": {},
    }
    for name in ("compress", "compress_"):
        key, value = small.make()
        try:
            with operators.settings(device=device):
                getattr(operators, name)(key, value, small.start, small.lag_size, small.keep, **small.scoring)
        except AssertionError as fault:  # no number beside a red check
            return {"reason": f"the executor found a fault in {name}: {fault}"}
        counts = operators.last().counts()
        read, write = counts["global_read"], counts["global_write"]
        sectors = read["sectors"] + write["sectors"]
        useful = read["useful_bytes"] + write["useful_bytes"]
        result["operators"][name] = {
            "read_bytes": _SECTOR * read["sectors"],
            "written_bytes": _SECTOR * write["sectors"],
            "over_least": _SECTOR * sectors / small.least_bytes(name),
            "sector_efficiency": useful / (_SECTOR * sectors),
        }
    return result


def _executor() -> tuple[ModuleType, ModuleType]:
    """The package ``simt`` of the tests with its module built, and the operators on it."""
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    simt = importlib.import_module("tests.simt")
    operators = importlib.import_module("tests.simt.operators")
    simt.module()
    return simt, operators


def _plan(module: Any, p: Problem, device: Any) -> dict[str, Any]:
    return module.plan_compress(
        torch.empty(0, dtype=p.dtype).element_size(),
        p.key_dim,
        p.value_dim,
        p.batch * p.heads,
        p.tokens,
        p.start,
        p.lag_size,
        p.keep,
        device=device,
    )


def _small(p: Problem, *, runs: int, run: int) -> Problem:
    return Problem(
        heads=1,
        tokens=p.start + (runs * run + 1) * p.lag_size,
        key_dim=p.key_dim,
        value_dim=p.value_dim,
        dtype=p.dtype,
        start=p.start,
        lag_size=p.lag_size,
        keep=p.keep,
        value_weight=p.value_weight,
        score=p.score,
    )
