"""Counts quality checks until a guard trips, recovers or lets a ladder move: ``python -m benchmarks.guard``.

Simulated requests with 50 answer tokens, with the very evidence that `lagkv_ext.serving.rollout` computes. Prints the
tables of docs/operations.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lagkv_ext.serving.rollout import Guard, LadderRules
from lagkv_ext.serving.rollout.sequence import BETS, EVENLY, ON_LARGE_BETS, bet, unstaked

RUNS = 500
#: Answers of one difficulty, of different difficulty, and answers that are right or wrong as a whole.
KINDS = ("alike", "different", "whole")


def agreements(
    generator: np.random.Generator, kind: str, mean: float | NDArray, shape: tuple[int, int]
) -> NDArray:
    """Agreement of each request ``[runs, checks]``."""
    if kind == "alike":
        return generator.binomial(50, mean, shape) / 50
    if kind == "different":
        return generator.binomial(50, generator.beta(20 * mean, 20 * (1 - mean), shape)) / 50
    return (generator.random(shape) < mean).astype(float)


def first(values: NDArray, bound: float, level: float, *, restarts: bool = True) -> NDArray:
    """The check of each run at which the mean of ``values`` is known to be above the bound; inf where it never is."""
    runs, checks = values.shape
    wealth, left, found = np.zeros((runs, len(BETS))), 1.0, np.full(runs, np.inf)
    weights = EVENLY if restarts else ON_LARGE_BETS
    for i in range(checks):
        then = unstaked(i + 1) if restarts else 0.0
        wealth = bet(wealth, left - then, values[:, i] / bound - 1)
        left = then
        hit = (wealth @ weights + left >= 1 / level) & np.isinf(found)
        found[hit] = i + 1
    return found


def shown(found: NDArray, after: int, most: int) -> str:
    median = float(np.median(found - after))
    return f"{median:.0f}" if np.isfinite(median) else f"over {most}"


def drops(guard: Guard, most: int = 3000) -> None:
    """From 0.985 at once."""
    bound, level = 1 - guard.min_agreement, guard.level / 2
    print("| agreement drops to | after | " + " | ".join(KINDS) + " |\n| --- | --- | --- | --- | --- |")
    for mean in (0.5, 0.9, 0.94, 0.96):
        for before in (0, 1000, 10000):
            cells = []
            for kind in KINDS:
                generator = np.random.default_rng(0)
                good = agreements(generator, kind, 0.985, (RUNS, before))
                bad = agreements(generator, kind, mean, (RUNS, most))
                found = first(1 - np.concatenate([good, bad], axis=1), bound, level)
                cells.append(shown(found, before, most))
            print(f"| {mean} | {before:,} checks | {' | '.join(cells)} |", flush=True)


def drift(guard: Guard, most: int = 20000) -> None:
    """From 0.99 by 0.01 in so many checks; counted from where it crosses the guard."""
    print("| agreement falls by 0.01 in | " + " | ".join(KINDS) + " |\n| --- | --- | --- | --- |")
    for slope in (100, 1000, 5000):
        crosses = round(slope * (0.99 - guard.min_agreement) / 0.01)
        cells = []
        for kind in KINDS:
            means = np.maximum(0.99 - 0.01 / slope * np.arange(crosses + most), 0.5)
            found = agreements(np.random.default_rng(0), kind, means, (RUNS, len(means)))
            cells.append(shown(first(1 - found, 1 - guard.min_agreement, guard.level / 2), crosses, most))
        print(f"| {slope:,} checks | {' | '.join(cells)} |", flush=True)


def good(guard: Guard, ladder: LadderRules, most: int = 3000) -> None:
    """Until a lower bound is above the guard (recovery) or above the target (a smaller cache)."""
    print("| true agreement | comes back | moves to a smaller cache |\n| --- | --- | --- |")
    for mean in (0.985, 0.99, 0.995, 1.0):
        cells = []
        for bound, level in ((guard.min_agreement, guard.level / 2), (ladder.target_agreement, ladder.level)):
            found = agreements(
                np.random.default_rng(0), "different" if mean < 1 else "alike", mean, (RUNS, most)
            )
            cells.append(shown(first(found, bound, level, restarts=False), 0, most))
        print(f"| {mean} | {' | '.join(cells)} |", flush=True)


def false(guard: Guard, checks: int = 5000, runs: int = 4000) -> None:
    """The share of runs that ever trip where the agreement is exactly at the guard."""
    print("| level | " + " | ".join(KINDS) + " |\n| --- | --- | --- | --- |")
    for level in (0.1, guard.level):
        cells = []
        for kind in KINDS:
            found = 1 - agreements(np.random.default_rng(0), kind, guard.min_agreement, (runs, checks))
            tripped = np.isfinite(first(found, 1 - guard.min_agreement, level / 2)).mean()
            cells.append(f"{tripped:.2%}")
        print(f"| {level} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    guard, ladder = Guard(), LadderRules(())
    print(
        f"guard: min_agreement {guard.min_agreement}, level {guard.level}; target {ladder.target_agreement}, level "
        f"{ladder.level}; {RUNS} runs, medians\n"
    )
    drops(guard)
    print()
    drift(guard)
    print()
    good(guard, ladder)
    print()
    false(guard)


if __name__ == "__main__":
    main()
