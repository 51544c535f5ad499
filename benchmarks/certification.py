"""Counts wrong certificates: Learn-then-Test as `lagkv evaluate` does it, and kvcalib where it is installed.

    pip install kvcalib==0.4.0
    python -m benchmarks.certification

Nine settings, losses of 0 or 1 per prompt with the expectations below. A calibration is wrong if it certifies (kvcalib:
selects) a setting whose expected loss is above the bound. kvcalib refuses where a mean loss grows with the cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lagkv_ext.commands.evaluate.learn_then_test import binomial_p

EXPECTED = np.asarray([0.0, 0.005, 0.01, 0.015, 0.0201, 0.025, 0.04, 0.08, 0.15])  # largest cache first
BOUND, LEVEL = 0.02, 0.05
RUNS = 1000


def draw(rng: np.random.Generator, prompts: int, same: bool) -> NDArray[np.float64]:
    """Losses ``[RUNS, prompts, settings]``; ``same``: what is lost with a cache is lost with all smaller ones."""
    uniform = rng.random((RUNS, prompts, 1 if same else len(EXPECTED)))
    return (uniform < EXPECTED).astype(np.float64)


def ours(losses: NDArray[np.float64]) -> tuple[float, float]:
    """Shares of the calibrations that are wrong, and that certify a setting."""
    passed = binomial_p(losses.sum(axis=1), losses.shape[1], BOUND) <= LEVEL
    certified = np.cumprod(passed, axis=1).astype(bool)
    return float(certified[:, EXPECTED > BOUND].any(axis=1).mean()), float(certified[:, 0].mean())


def kvcalib(losses: NDArray[np.float64]) -> tuple[float, float] | None:
    """Shares of the calibrations that are wrong, and that are refused; None where kvcalib is not installed."""
    try:
        from kvcalib.core.risk_control import ConformalRiskControl
        from kvcalib.core.validation import monotonicity_check
    except ImportError:
        return None
    wrong = refused = 0
    budgets = list(range(1, len(EXPECTED) + 1))  # ascending
    for run in losses[:, :, ::-1]:
        if not monotonicity_check(budgets, run, tolerance=1e-9).passed:
            refused += 1
            continue
        found = ConformalRiskControl().select(budgets, run, BOUND, bound=1.0, groups=None)
        wrong += EXPECTED[::-1][found.selected_budget - 1] > BOUND
    return wrong / len(losses), refused / len(losses)


def main() -> None:
    print("| prompts | lost prompts | kvcalib: wrong | refused | ours: wrong | certified something |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for prompts in (100, 200, 400):
        for same in (True, False):
            losses = draw(np.random.default_rng(0), prompts, same)
            theirs = kvcalib(losses)
            shown = ["not installed", "-"] if theirs is None else [f"{100 * x:.1f}%" for x in theirs]
            mine = [f"{100 * x:.1f}%" for x in ours(losses)]
            which = "the same for all settings" if same else "independent"
            print(f"| {prompts} | {which} | " + " | ".join(shown + mine) + " |")


if __name__ == "__main__":
    main()
