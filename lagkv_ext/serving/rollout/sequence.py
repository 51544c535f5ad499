"""Bounds on a mean that hold at every moment at once, so that they may be looked at after every check.

Testing by betting: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS B
86(1), 2024, arXiv:2010.09686. A bettor who does not believe that the mean of non-negative numbers X is at most
m bets a share ``bet`` of the wealth on each number and has

    wealth_t = product over i <= t of (1 + bet (X_i / m - 1)),        0 <= bet < 1,

which is their capital process K_t(m) = product of (1 + lambda_i (X_i - m)) with lambda_i = bet / m. Where every
X_i has a mean of at most m, given those before it, the wealth is a non-negative supermartingale that begins at
1, so the probability that it ever reaches ``1 / level`` is at most ``level`` (Ville's inequality). That assumes
nothing else: no distribution of X, no number of checks, no time of looking.

Averages of supermartingales are supermartingales. Two are taken:

- over `BETS`. The best bet depends on how far the mean is from m; the average over a fixed grid, with fixed
  weights, earns nearly as much as the best of the grid (their Appendix B.6).
- over the moment at which betting begins (``restarts``). After t numbers ``1 / (1 + log(1 + t))`` of the stake is
  not yet bet, and each number brings in a part of it. A part that joins late has lost nothing to the good numbers
  before it, so a change after 10,000 good numbers is found nearly as fast as one at the beginning. The price is
  the logarithm of the part, about ``log t + 2 log log t``. Weights of change points are from Shin, Ramdas &
  Rinaldo, "E-detectors", 2023, arXiv:2203.03532; here they add up to 1, which bounds the probability of a false
  alarm for all time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Shares of the wealth that are bet. The largest is below 1, so that no single number takes all of the wealth.
BETS = np.array([0.95, *(0.5**k for k in range(1, 9))])
#: Stakes over `BETS` where a change has to be found: even, since a drop may be large or small.
EVENLY = np.full(len(BETS), 1 / len(BETS))
#: Stakes where a mean near the upper end has to be confirmed: half on the largest bet, and so on.
ON_LARGE_BETS = 0.5 ** np.arange(1, len(BETS) + 1) / (1 - 0.5 ** len(BETS))
#: A larger X / m counts as this much: it is evidence enough, and infinity is no factor.
_LARGEST = 1e6
#: Wealth is cut here, far above the inverse of any level, so that it stays finite.
_RICHEST = 1e200
#: Shares at which bounds are known, finer towards 1, where agreements are.
_GRID = 1 - np.concatenate([np.geomspace(0.001, 0.25, 24), np.linspace(0.3, 0.95, 14)])


def unstaked(count: int) -> float:
    """The part of the stake that is not yet bet after so many numbers."""
    return float(1 / (1 + np.log1p(count)))


def bet(wealth: NDArray, joining: float, excess: NDArray) -> NDArray:
    """The wealth ``[..., bets]`` after one number; ``joining`` is added before, ``excess [...]`` is X / m - 1."""
    return np.minimum((wealth + joining) * (1 + BETS * excess[..., None]), _RICHEST)


class MeanAbove:
    """Evidence that the mean of non-negative numbers is above each of some bounds, all positive."""

    def __init__(self, bounds: Sequence[float] | NDArray, *, restarts: bool):
        self.bounds = np.asarray(bounds, dtype=float)
        self.count = 0
        self._restarts = restarts
        self._weights = EVENLY if restarts else ON_LARGE_BETS
        self._wealth = np.zeros((len(self.bounds), len(BETS)))
        self._left = 1.0  # of the stake
        #: Average wealth now, beginning at 1: `1 / level` or more shows that the mean is above a bound.
        self.evidence = np.ones(len(self.bounds))
        self.peak = np.ones(len(self.bounds))  #: the largest evidence so far

    def add(self, value: float) -> None:
        """Takes in one number; infinity is allowed."""
        self.count += 1
        left = unstaked(self.count) if self._restarts else 0.0
        self._wealth = bet(self._wealth, self._left - left, np.minimum(value / self.bounds, _LARGEST) - 1)
        self._left = left
        self.evidence = self._wealth @ self._weights + left
        np.maximum(self.peak, self.evidence, out=self.peak)


class ShareBounds:
    """Bounds on the mean of numbers in [0, 1], at the points of a grid and at some points exactly.

    The upper bound serves alarms and follows changes. The lower bound is for the numbers since the first one.
    """

    def __init__(self, exact: Sequence[float]):
        self.points = np.unique([*_GRID, *exact])
        # 1 has nothing above it, and 0 nothing below.
        self._below = MeanAbove(1 - self.points[self.points < 1], restarts=True)
        self._above = MeanAbove(self.points[self.points > 0], restarts=False)
        self._least = 1.0

    @property
    def count(self) -> int:
        return self._above.count

    def add(self, value: float) -> None:
        self._below.add(1 - value)
        self._above.add(value)
        self._least = min(self._least, value)

    def is_below(self, point: float, level: float) -> bool:
        """Tells whether the mean is, or was for a time, below one of the exact points. Where it never is, the answer is
        ever True with a probability of at most ``level``."""
        if point == 1:
            return self._least < 1
        return bool((self._below.peak[self._below.bounds == 1 - point] >= 1 / level).any())

    def is_above(self, point: float, level: float) -> bool:
        """Tells whether the mean is above one of the exact points. Where it never is, the answer is ever True with a
        probability of at most ``level``."""
        return bool((self._above.evidence[self._above.bounds == point] >= 1 / level).any())

    def bounds(self, level: float) -> tuple[float, float]:
        """Lower and upper bound. Each is ever wrong with a probability of at most ``level``."""
        above = self._above.bounds[self._above.peak >= 1 / level]
        below = 1 - self._below.bounds[self._below.peak >= 1 / level]
        return float(above.max(initial=0.0)), float(below.min(initial=1.0))
