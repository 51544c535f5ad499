"""Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052): which settings have an expected loss below a bound.

Each setting has the null hypothesis "its expected loss is above the bound", and a p-value from losses of independent
prompts. Settings are tested in orders fixed before the losses are known; an order ends at its first failure. The
probability that any setting above the bound is certified is at most the level, for every dependence between settings.

The p-values hold for independent prompts of several distributions (tasks) too: the bound is then on the average of
their expected losses. For 0/1 losses that is Hoeffding 1956 (the binomial tail below the mean).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Recorded scores have 6 digits: the sum of n losses differs from the true sum by at most n times this.
_ROUNDING = 1e-6
# The most prompts that `prompts_needed` calls an answer.
MOST_PROMPTS = 1_000_000


def binomial_cdf(n: int, p: float, most: int | None = None) -> NDArray[np.float64]:
    """``P(X <= k)`` for ``k = 0 .. most`` (default ``n``) of ``X ~ Binomial(n, p)``, relative error below 1e-10.

    Raises ValueError: ``n`` below 0, or ``p`` outside (0, 1).
    """
    if n < 0 or not 0 < p < 1:
        raise ValueError(f"n must be at least 0 and p in (0, 1), got n={n} and p={p}")
    k = np.arange(1, (n if most is None else min(most, n)) + 1, dtype=np.float64)
    steps = np.log((n - k + 1) / k) + (math.log(p) - math.log1p(-p))
    log_pmf = n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(steps)])
    return np.minimum(np.exp(np.logaddexp.accumulate(log_pmf)), 1.0)


def binomial_p(total: ArrayLike, n: int, bound: float) -> NDArray[np.float64]:
    """Exact p-values of "the expected loss is above ``bound``" for ``n`` losses of 0 or 1 that sum to ``total``.

    Raises ValueError: a total that is no whole number of 0 to ``n``; a bound outside (0, 1).
    """
    counts = np.asarray(total, dtype=np.float64)
    if not np.all((counts == np.round(counts)) & (counts >= 0) & (counts <= n)):
        raise ValueError(f"totals of {n} losses of 0 or 1 must be whole numbers of 0 to {n}, got {total!r}")
    counts = counts.astype(np.int64)
    return binomial_cdf(n, bound, int(counts.max(initial=0)))[counts]


def hoeffding_bentkus_p(total: ArrayLike, n: int, bound: float) -> NDArray[np.float64]:
    """P-values of "the expected loss is above ``bound``" for ``n`` losses in [0, 1] that sum to ``total``.

    The smaller of Hoeffding's bound ``exp(-n KL(mean, bound))`` and Bentkus's ``e P(Binomial(n, bound) <= total)``,
    with the total rounded up (Bates et al. 2021, arXiv 2101.02703, proposition 2).

    Raises ValueError: a total outside 0 to ``n``; a bound outside (0, 1).
    """
    sums = np.asarray(total, dtype=np.float64)
    if n < 1 or not np.all((sums >= 0) & (sums <= n * (1 + _ROUNDING))):
        raise ValueError(f"totals of {n} losses in [0, 1] must be in [0, {n}], got {total!r}")
    counts = np.ceil(sums - n * _ROUNDING).clip(0).astype(np.int64)
    bentkus = math.e * binomial_cdf(n, bound, int(counts.max(initial=0)))[counts]
    mean = np.minimum(sums / n, bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(mean > 0, mean * np.log(mean / bound), 0.0)
    divergence = below + (1 - mean) * (np.log1p(-mean) - math.log1p(-bound))
    return np.minimum(np.minimum(np.exp(-n * divergence), bentkus), 1.0)


def certified(orders: Sequence[Sequence[float]], level: float) -> list[int]:
    """Counts the settings of each order that are certified, given the p-values in each order.

    The level is divided equally among the orders. The share of an order that is certified to its end passes to the
    others in equal parts (a graphical procedure: Bretz et al. 2009, doi 10.1002/sim.3495).

    Raises ValueError: a p-value outside [0, 1] or NaN.
    """
    for p in (p for order in orders for p in order):
        if not 0 <= p <= 1:
            raise ValueError(f"p-values must be in [0, 1], got {p}")
    counts = [0] * len(orders)
    shares = dict.fromkeys((i for i, order in enumerate(orders) if order), 0.0)
    for i in shares:
        shares[i] = level / len(shares)
    while True:
        for i, share in shares.items():
            while counts[i] < len(orders[i]) and orders[i][counts[i]] <= share:
                counts[i] += 1
        finished = [i for i in shares if counts[i] == len(orders[i])]
        if not finished or len(finished) == len(shares):
            return counts
        freed = sum(shares.pop(i) for i in finished)
        for i in shares:
            shares[i] += freed / len(shares)


def prompts_needed(mean: float, bound: float, level: float, *, binary: bool) -> int | None:
    """Prompts with which a setting whose losses average ``mean`` is certified at ``level``.

    None: none, because the mean is not below the bound, or more than `MOST_PROMPTS`.
    """
    if bound >= 1:
        return 1
    if mean >= bound:
        return None

    def passes(n: int) -> bool:
        if binary:
            return float(binomial_p(math.ceil(n * (mean - _ROUNDING)), n, bound)) <= level
        return float(hoeffding_bentkus_p(n * mean, n, bound)) <= level

    high = 1
    while not passes(high):
        high *= 2
        if high > MOST_PROMPTS:
            return None
    low = high // 2  # too few, unless high is 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
