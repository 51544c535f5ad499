"""A guarantee for a setting: with a given confidence its expected loss on prompts like these is within the tolerance.

The loss of a prompt is the full cache's score minus the setting's on the same questions, averaged over the prompt's
questions, and 0 where the setting scores higher: a number in [0, 1]. A gain on one prompt does not make up for a loss
on another, so the expected loss is at least the difference of the expected scores. Prompts are the units, since
questions on one context share its cache; samples with the same context are one prompt. The expectation is over prompts
drawn as these were, tasks in the same proportions.

Settings that differ in ``keep_ratio`` alone are tested from the largest cache to the smallest (`learn_then_test`). Each
attempt tests on prompts that no earlier report has shown, because settings and numbers of prompts are chosen after
reading reports. Attempt ``k`` has 4/5 * 5^(1 - k) of the error probability, so all attempts together stay within it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lagkv_ext.commands.evaluate import learn_then_test
from lagkv_ext.commands.evaluate.summary import summarise
from lagkv_ext.commands.evaluate.types import EvaluationError, Setting

CONFIDENCE = 0.95
KIND = "attempt"  # of its line in results.jsonl
_FIRST_SHARE = 0.8

Prompt = tuple[str, str]  # task, digest of the context


@dataclass(frozen=True)
class Tested:
    """One setting in one attempt."""

    setting: Setting
    prompts: int
    mean_loss: float  # in [0, 1]
    p_value: float
    certified: bool


@dataclass(frozen=True)
class Attempt:
    """One test of all settings on new prompts: a line of results.jsonl.

    ``level``: probability of any wrong certificate that this attempt may have; 0 where nothing was tested, because of
    ``reason``.
    """

    confidence: float
    tolerance: float  # points
    level: float
    binary: bool  # all losses are 0 or 1 by construction: exact binomial p-values, else Hoeffding-Bentkus
    tasks: dict[str, int]  # prompts of each task
    tested: tuple[Tested, ...] = ()
    reason: str = ""

    @property
    def prompts(self) -> int:
        return sum(self.tasks.values())

    def meets(self, confidence: float, tolerance: float) -> bool:
        """Tells whether a certificate of this attempt holds for these too."""
        return self.confidence >= confidence and self.tolerance <= tolerance

    def to_json(self) -> dict[str, Any]:
        tested = [{**dataclasses.asdict(x), "setting": x.setting.to_json()} for x in self.tested]
        return {"kind": KIND, **dataclasses.asdict(self), "tested": tested}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Attempt:
        """From `to_json`. Raises EvaluationError: a line that this version did not write."""
        try:
            tested = (Tested(**{**x, "setting": Setting.from_json(x["setting"])}) for x in data["tested"])
            return cls(**{**{k: v for k, v in data.items() if k != "kind"}, "tested": tuple(tested)})
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"the results have a damaged line of kind {KIND!r}: {error}") from error


@dataclass(frozen=True)
class Certificates:
    """Everything certified from one results file, and what further prompts could certify.

    ``certified``: setting name -> the attempt that certified it. ``needed``: setting name -> new prompts with which the
    next attempt would certify it if losses stay as measured; None where no number of prompts would.
    """

    confidence: float
    tolerance: float
    attempts: tuple[Attempt, ...]
    certified: dict[str, Attempt]
    needed: dict[str, int | None]
    mean_loss: dict[str, float]  # over all prompts measured

    def about(self, name: str) -> dict[str, Any]:
        """The state of a setting in JSON: ``certified``, by how many ``prompts`` or how many ``new_prompts_needed``."""
        found: dict[str, Any] = {
            "certified": name in self.certified,
            "confidence": self.confidence,
            "tolerance_points": self.tolerance,
            "statement": self.text(name),
        }
        if attempt := self.certified.get(name):
            tested = next(x for x in attempt.tested if x.setting.name == name)
            return {**found, "prompts": tested.prompts, "tasks": attempt.tasks, "p_value": tested.p_value}
        return {**found, "new_prompts_needed": self.needed.get(name)}

    def text(self, name: str) -> str:
        """The statement on a setting, one or two sentences."""
        percent, points = f"{100 * self.confidence:g}%", f"{self.tolerance:g} points"
        if attempt := self.certified.get(name):
            tested = next(x for x in attempt.tested if x.setting.name == name)
            return (
                f"With {percent} confidence its expected loss on prompts like these is at most {points} "
                f"({tested.prompts} prompts, mean loss {100 * tested.mean_loss:.2g})."
            )
        if name not in self.needed:
            return "It was not tested for a guarantee."
        loss = f"{100 * self.mean_loss[name]:.2g}"
        why = f" ({self.attempts[-1].reason})" if self.attempts and self.attempts[-1].reason else ""
        needed = self.needed[name]
        if needed is None:
            return (
                f"That its expected loss is at most {points} is not certified{why}, and more prompts will not do it if "
                f"losses stay as measured: a mean loss of {loss}, or more for a larger cache that comes before it."
            )
        return (
            f"That its expected loss is at most {points} is not certified{why}: about {needed:,} new prompts would "
            f"decide with {percent} confidence if its mean loss stays at {loss}."
        )


def check(confidence: float, tolerance: float) -> None:
    """Raises EvaluationError: values that make no sense."""
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence must be in (0, 1), got {confidence}")
    if not 0 <= tolerance <= 100:
        raise EvaluationError(f"tolerance must be 0 to 100 points, got {tolerance}")


def attempt(
    records: Sequence[dict[str, Any]],
    *,
    testable: Callable[[Setting], bool],
    tolerance: float,
    confidence: float = CONFIDENCE,
    searched: bool = False,
    seed: int = 0,
) -> Attempt | None:
    """Test the settings measured on the prompts that came to ``records`` after the last attempt.

    None where no setting was measured on such a prompt. ``searched``: the settings were chosen by their results on
    these prompts, so that nothing can be tested on them.
    """
    earlier, new = _split(records)
    if not any(_prompt(x) in new and testable(Setting.from_json(x["setting"])) for x in _results(records)):
        return None
    orders, losses, binary = _orders(records, new, testable, seed)
    done = _certified(earlier, confidence, tolerance)
    left = [x for order in orders if (x := [s for s in order if s.name not in done])]
    tasks = dict(Counter(task for task, _ in losses.get("full", {})))
    found = Attempt(confidence, tolerance, 0.0, binary, tasks)
    if not tasks:
        return dataclasses.replace(
            found, reason="the full cache is hardly better than guessing on every task"
        )
    if searched:
        return dataclasses.replace(found, reason="the search chose its settings on these prompts")
    if not left:
        why = "every setting has its certificate" if orders else "no setting was measured on every task"
        return dataclasses.replace(found, reason=why)
    orders = left
    level, bound = _level(earlier, confidence), tolerance / 100
    least = learn_then_test.prompts_needed(0.0, bound, level / len(orders), binary=binary)
    if least is None or found.prompts < least:
        many = f"no number of prompts decides on a tolerance of {tolerance:g}"
        few = f"{found.prompts} new prompts are fewer than the {least} that are needed without any loss"
        return dataclasses.replace(found, reason=many if least is None else few)
    values = [[_p_value(losses[s.name].values(), bound, binary) for s in order] for order in orders]
    counts = learn_then_test.certified(values, level)
    tested = tuple(
        Tested(s, len(losses[s.name]), fmean(losses[s.name].values()), p, i < count)
        for order, of_order, count in zip(orders, values, counts, strict=True)
        for i, (s, p) in enumerate(zip(order, of_order, strict=True))
    )
    return dataclasses.replace(found, level=level, tested=tested)


def certificates(
    records: Sequence[dict[str, Any]],
    *,
    testable: Callable[[Setting], bool],
    tolerance: float,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Certificates:
    """Collects what the attempts in ``records`` certified for this confidence and tolerance. Tests nothing."""
    earlier, _ = _split(records)
    orders, losses, binary = _orders(records, None, testable, seed)
    done = _certified(earlier, confidence, tolerance)
    orders = [left for order in orders if (left := [s for s in order if s.name not in done])]
    needed: dict[str, int | None] = {}
    means = {name: fmean(x.values()) for name, x in losses.items() if x}
    level = _level(earlier, confidence)
    for order in orders:
        most: int | None = 0
        for setting in order:
            if most is not None:
                n = learn_then_test.prompts_needed(
                    means[setting.name], tolerance / 100, level / len(orders), binary=binary
                )
                most = None if n is None else max(most, n)
            needed[setting.name] = most
    return Certificates(confidence, tolerance, tuple(earlier), done, needed, means)


def _certified(attempts: Iterable[Attempt], confidence: float, tolerance: float) -> dict[str, Attempt]:
    return {
        x.setting.name: attempt
        for attempt in attempts
        if attempt.meets(confidence, tolerance)
        for x in attempt.tested
        if x.certified
    }


def _level(earlier: Sequence[Attempt], confidence: float) -> float:
    """Level of the next attempt; attempts that tested nothing have used nothing up."""
    used = sum(x.level > 0 for x in earlier)
    return (1 - confidence) * _FIRST_SHARE * (1 - _FIRST_SHARE) ** used


def _split(records: Sequence[dict[str, Any]]) -> tuple[list[Attempt], set[Prompt]]:
    """The attempts so far, and the prompts measured since the last one and never before."""
    attempts: list[Attempt] = []
    old: set[Prompt] = set()
    new: set[Prompt] = set()
    for x in records:
        if x["kind"] == KIND:
            attempts.append(Attempt.from_json(x))
            old |= new
            new = set()
        elif x["kind"] == "result" and (prompt := _prompt(x)) not in old:
            new.add(prompt)
    return attempts, new


def _results(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [x for x in records if x["kind"] == "result"]


def _prompt(record: dict[str, Any]) -> Prompt:
    # Files of earlier versions have no digest of the context alone.
    return record["task"], record.get("context", record["digest"])


def _orders(
    records: Sequence[dict[str, Any]],
    prompts: set[Prompt] | None,
    testable: Callable[[Setting], bool],
    seed: int,
) -> tuple[list[list[Setting]], dict[str, dict[Prompt, float]], bool]:
    """Settings in the orders of their tests, the losses of each on ``prompts`` (default: all), and whether all losses
    are 0 or 1 by construction.

    Tasks on which the full cache is hardly better than guessing do not count, nor settings that were not measured on
    every other task.
    """
    summary = summarise(records, seed=seed)
    silent = summary.silent()
    questions: dict[str, dict[Prompt, _Asked]] = {}
    for x in summary.records:
        prompt = _prompt(x)
        if x["task"] not in silent and (prompts is None or prompt in prompts):
            questions.setdefault(x["setting_name"], {}).setdefault(prompt, {})[x["digest"]] = x["questions"]
    full = questions.get("full", {})
    tasks = {task for task, _ in full}
    binary = all(
        [q.get("binary", False) for questions in asked.values() for q in questions] == [True]
        for asked in full.values()
    )
    losses = {
        name: {
            prompt: _loss(full[prompt], asked)
            for prompt, asked in found.items()
            if asked.keys() <= full.get(prompt, {}).keys()
        }
        for name, found in questions.items()
    }
    orders: dict[Setting, list[Setting]] = {}
    for name, setting in summary.settings.items():
        measured = {task for task, _ in losses.get(name, {})}
        if name != "full" and testable(setting) and measured and measured == tasks:
            orders.setdefault(dataclasses.replace(setting, keep_ratio=1.0), []).append(setting)
    return [sorted(x, key=lambda s: -s.keep_ratio) for x in orders.values()], losses, binary


_Asked = dict[str, list[dict[str, Any]]]  # digest of the sample -> its questions with their scores


def _loss(full: _Asked, other: _Asked) -> float:
    above = fmean(
        float(a["score"]) - float(b["score"])
        for digest, questions in other.items()
        for a, b in zip(full[digest], questions, strict=True)
    )
    # A score that is not a number counts as no answer.
    return min(max(above, 0.0), 1.0) if math.isfinite(above) else 1.0


def _p_value(losses: Iterable[float], bound: float, binary: bool) -> float:
    values = list(losses)
    if bound >= 1:
        return 0.0
    test = learn_then_test.binomial_p if binary else learn_then_test.hoeffding_bentkus_p
    return float(test(math.fsum(values), len(values), bound))
