"""Bootstrap confidence intervals of means, single and paired, and the verdict whether a difference is more than noise.

The unit that is drawn is the prompt: questions on one prompt share its cache and are not independent, so all
of them are drawn together. A task with one prompt only draws its questions, and says so (`Interval.unit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
DRAWS = 2000
# Fewer units than this all fall on one side by chance too often (2 ** -4 = 6%) for any verdict.
MIN_UNITS = 5
Scores = Mapping[str, Sequence[float]]  # prompt -> score of each of its questions


@dataclass(frozen=True)
class Interval:
    """A mean over questions with its confidence interval; ``low`` and ``high`` are None where one unit
    tells no spread.
    """

    mean: float
    low: float | None
    high: float | None
    prompts: int
    questions: int
    unit: str  # what was drawn: "prompt" or "question"

    @property
    def units(self) -> int:
        return self.prompts if self.unit == "prompt" else self.questions

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Mean of ``method - baseline`` over the same questions. ``verdict``: "better", "worse", "noise";
    "unknown" below MIN_UNITS.
    """

    interval: Interval

    @property
    def verdict(self) -> str:
        low, high = self.interval.low, self.interval.high
        if low is None or high is None or self.interval.units < MIN_UNITS:
            return "unknown"
        if high < 0:
            return "worse"
        return "better" if low > 0 else "noise"


def mean_interval(scores: Scores, *, seed: int = 0, level: float = LEVEL, draws: int = DRAWS) -> Interval:
    """Percentile bootstrap of the mean over all questions.

    Raises ValueError: no scores at all.
    """
    groups = [np.asarray(x, dtype=np.float64) for x in scores.values() if len(x)]
    questions = sum(len(g) for g in groups)
    if not questions:
        raise ValueError("there are no scores to average")
    mean = float(np.concatenate(groups).mean())
    unit, prompts = "prompt", len(groups)
    if prompts == 1:
        groups, unit = [np.asarray([x]) for x in groups[0]], "question"
    if len(groups) == 1:
        return Interval(mean, None, None, prompts, questions, unit)
    sums = np.asarray([g.sum() for g in groups])
    counts = np.asarray([len(g) for g in groups])
    picked = np.random.default_rng(seed).integers(len(groups), size=(draws, len(groups)))
    means = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), prompts, questions, unit)


def difference(
    method: Scores, baseline: Scores, *, seed: int = 0, level: float = LEVEL, draws: int = DRAWS
) -> Difference:
    """Paired bootstrap of ``method - baseline`` over the prompts that both have.

    Raises ValueError: no prompt in common, or a different number of questions on one.
    """
    paired = {}
    for prompt in method.keys() & baseline.keys():
        a, b = method[prompt], baseline[prompt]
        if len(a) != len(b):
            raise ValueError(f"prompt {prompt!r} has {len(a)} scores against {len(b)} of the baseline")
        paired[prompt] = [x - y for x, y in zip(a, b, strict=True)]
    # Sets have no order, and the bootstrap must draw the same every time.
    return Difference(mean_interval(dict(sorted(paired.items())), seed=seed, level=level, draws=draws))
