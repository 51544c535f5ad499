"""The smallest cache whose loss is inside the tolerance, guaranteed where the prompts suffice; and a search for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import lagkv_ext.arguments
from lagkv_ext.commands.evaluate.certify import Certificates
from lagkv_ext.commands.evaluate.methods import LagKV
from lagkv_ext.commands.evaluate.statistics import Difference
from lagkv_ext.commands.evaluate.summary import Summary
from lagkv_ext.commands.evaluate.types import Setting
from lagkv_ext.settings_file import NAMES, settings_text

TOLERANCE = 2.0  # points
# A loss inside the noise passes only where the noise is narrower than this: else more prompts have to tell.
WIDEST = 10.0

SEARCHED = ("lagkv-blend-smooth3-head", "lagkv-blend-smooth3", "lagkv-cosine", "lagkv-std")


@dataclass(frozen=True)
class Judgement:
    """A setting against the tolerance. ``tasks[task]``: "ok", "worse" or "undecided"."""

    setting: Setting
    tasks: dict[str, str]
    share: float  # of the full-attention layers' bytes that are kept
    worst: tuple[str, float]  # task and its mean loss in points
    excluded: float  # the largest loss in points that the confidence intervals leave possible

    @property
    def passes(self) -> bool:
        return set(self.tasks.values()) <= {"ok"}


@dataclass(frozen=True)
class Recommendation:
    """``best`` is None where nothing qualifies: do not compress. ``ahead``: a smaller setting that passes too, but
    whose options this version's `LagKVCache` does not take. ``smaller``: one that passes too, but has no certificate,
    which ``best`` has; of several the one that needs the fewest prompts for it.
    """

    best: Judgement | None
    judged: tuple[Judgement, ...]
    tolerance: float
    ahead: Judgement | None = None
    smaller: Judgement | None = None
    certificates: Certificates | None = None

    @property
    def undecided(self) -> list[Judgement]:
        """Settings that no task speaks against, but that too few prompts were run for."""
        return [j for j in self.judged if "worse" not in j.tasks.values() and not j.passes]

    def about(self) -> dict[str, Any] | None:
        """The note in lagkv.json on what is known of the best setting; None where there is no best setting."""
        if self.best is None:
            return None
        found: dict[str, Any] = {
            "written_by": "lagkv evaluate",
            "share_kept": round(self.best.share, 4),
            "tolerance_points": self.tolerance,
        }
        if self.certificates is not None:
            found["certificate"] = self.certificates.about(self.best.setting.name)
        return found

    def text(self) -> str:
        """One to five sentences."""
        parts = [self._best()]
        if self.best is not None and self.certificates is not None:
            parts.append(self.certificates.text(self.best.setting.name))
            if self.smaller is not None:
                other = self.smaller
                statement = self.certificates.text(other.setting.name)
                parts.append(
                    f"{other.setting.name} keeps {100 * other.share:.0f}% and passes here. {statement}"
                )
        if self.ahead is not None:
            parts.append(
                f"{self.ahead.setting.name} would pass with {100 * self.ahead.share:.0f}%, but its options "
                "are not yet taken by LagKVCache."
            )
        return " ".join(parts)

    def _best(self) -> str:
        if self.best is None:
            more = ""
            if self.undecided:
                open_tasks = sorted({t for t, v in self.undecided[0].tasks.items() if v == "undecided"})
                more = (
                    f" {self.undecided[0].setting.name} is undecided on {', '.join(open_tasks)}: "
                    "more prompts (--prompts) would tell."
                )
            tried = (
                f"none of the {len(self.judged)} settings tried stays"
                if self.judged
                else "no LagKV setting was tried that could stay"
            )
            return f"Do not compress: {tried} within {self.tolerance:g} points of the full cache on every task.{more}"
        task, loss = self.best.worst
        change = f"loses most on {task}, {loss:.1f} points" if loss > 0 else "loses on no task"
        return (
            f"{line(self.best.setting)} keeps {100 * self.best.share:.0f}% of the full-attention "
            f"cache in these runs and {change}; "
            f"with these numbers of prompts a loss of {max(0.0, self.best.excluded):.1f} points "
            f"on one task cannot be excluded."
        )


def judge(loss: Difference, tolerance: float) -> str:
    """ "ok": the mean loss is inside the tolerance, or is noise of less than `WIDEST` points; else "worse"
    or "undecided".
    """
    mean, low = 100 * loss.interval.mean, loss.interval.low
    if mean >= -tolerance:
        return "ok"
    if loss.verdict == "worse":
        return "worse"
    return "ok" if loss.verdict == "noise" and low is not None and 100 * low >= -WIDEST else "undecided"


def recommend(
    summary: Summary, *, tolerance: float = TOLERANCE, certificates: Certificates | None = None
) -> Recommendation:
    """Judge every setting of LagKV; the smallest that `LagKVCache` takes and that passes on every task is the best.
    Where some of these have a certificate, it is the smallest with one.

    A setting counts only where it was measured on every task that the full cache was. Tasks on which the full cache
    itself is hardly better than guessing (`Summary.silent`) do not count.
    """
    judged = []
    silent = summary.silent()
    tasks_heard = [t for t in summary.tasks if t not in silent]
    for name, setting in summary.settings.items():
        losses = {t: c.loss for t in tasks_heard if (c := summary.cell(name, t)) and c.loss is not None}
        if arguments(setting) is None or not losses or len(losses) < len(tasks_heard):
            continue
        share = fmean(
            summary.cells[name][t].full_layer_bytes / summary.cells["full"][t].full_layer_bytes
            for t in losses
        )
        worst = min(losses, key=lambda t: losses[t].interval.mean)
        low = min(x.interval.mean if x.interval.low is None else x.interval.low for x in losses.values())
        tasks = {t: judge(x, tolerance) for t, x in losses.items()}
        judged.append(
            Judgement(setting, tasks, share, (worst, -100 * losses[worst].interval.mean), -100 * low)
        )
    judged.sort(key=lambda j: (round(j.share, 6), j.worst[1]))
    passing = [j for j in judged if j.passes]
    usable = [j for j in passing if deployable(j.setting)]
    smallest = usable[0] if usable else None
    certain = certificates.certified if certificates is not None else {}
    best = next((j for j in usable if j.setting.name in certain), smallest)
    ahead = passing[0] if passing and passing[0] is not smallest else None
    without = usable[: usable.index(best)] if best is not None else []
    smaller = min(without, key=lambda j: _prompts_needed(j, certificates), default=None)
    return Recommendation(best, tuple(judged), tolerance, ahead, smaller, certificates)


def _prompts_needed(j: Judgement, certificates: Certificates | None) -> float:
    needed = None if certificates is None else certificates.needed.get(j.setting.name)
    return math.inf if needed is None else needed


def arguments(setting: Setting) -> dict[str, Any] | None:
    """The keyword arguments of `LagKVCache` for this setting; None for a method that is not LagKV's, or that reads the
    context in another way than the others.
    """
    options = dict(setting.options)
    base: dict[str, Any] = {
        "keep_ratio": setting.keep_ratio,
        "lag_size": setting.lag_size,
        "sink_size": setting.sink_size,
    }
    if (ours := LagKV.parse(setting.method)) is not None:
        return {**base, **ours.arguments} if ours.arguments is not None and not options else None
    if setting.method == "lagkv-cache":
        ratios = {int(k.removeprefix("layer")): v for k, v in options.items() if k.startswith("layer")}
        rest = {k: v for k, v in options.items() if not k.startswith("layer") and k != "chunk"}
        return {**base, **rest, **({"layer_keep_ratio": ratios} if ratios else {})}
    return None


def deployable(setting: Setting) -> bool:
    """True where this version's `LagKVCache` takes the setting's arguments."""
    found = arguments(setting)
    return (
        found is not None
        and set(found) <= set(NAMES)
        and found.get("score", "std") in lagkv_ext.arguments.SCORES
    )


def line(setting: Setting) -> str:
    """The Python expression that makes this cache."""
    given = ", ".join(f"{k}={v!r}" for k, v in (arguments(setting) or {}).items())
    return f"LagKVCache(model.config, {given})"


def ladder(found: Recommendation) -> tuple[Judgement, ...]:
    """The settings among which a server may move, from the largest cache to the best one.

    They differ from the best in ``keep_ratio`` alone and pass too, with a certificate if the best has one. Each holds
    less than the one before.
    """
    best = found.best
    if best is None:
        return ()
    certain = found.certificates.certified if found.certificates is not None else {}
    rungs: list[Judgement] = []
    for j in sorted(found.judged, key=lambda j: -j.share):
        same = dataclasses.replace(j.setting, keep_ratio=best.setting.keep_ratio) == best.setting
        as_sure = best.setting.name not in certain or j.setting.name in certain
        smaller = not rungs or j.share < rungs[-1].share
        if j.passes and same and as_sure and smaller and j.share >= best.share:
            rungs.append(j)
    return tuple(rungs)


def config(setting: Setting, about: Any = None) -> str:
    """`arguments` as the text of a settings file (`lagkv_ext.read_settings`), with the note ``about``."""
    return settings_text(arguments(setting) or {}, about)


Measure = Callable[[Sequence[Setting]], Summary]


def search(
    measure: Measure,
    *,
    methods: Iterable[str] = SEARCHED,
    lag_sizes: Iterable[int] = (128, 64),
    keep_ratios: Sequence[float] = (0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625),
    layers: Sequence[int] = (),
    sink_size: int = 16,
    tolerance: float = TOLERANCE,
) -> Recommendation:
    """Look for the smallest cache that passes, measuring as little as is needed.

    For each method and lag size the smallest passing ratio is found by bisection (a smaller cache is taken not to be
    better); then the layers of the best that `LagKVCache` takes are brought down one by one to the next smaller ratio,
    as long as every task stays ok.
    """
    ratios = sorted(keep_ratios)
    summary = Summary()
    best: Setting | None = None

    def judged(setting: Setting) -> Judgement:
        nonlocal summary
        summary = measure([setting])
        found = [j for j in recommend(summary, tolerance=tolerance).judged if j.setting == setting]
        return found[0] if found else Judgement(setting, {"not measured": "worse"}, 1.0, ("", 100.0), 100.0)

    smallest = 2.0
    for lag in lag_sizes:
        for method in methods:
            low, high = 0, len(ratios)  # ratios[high:] pass
            while low < high:
                middle = (low + high) // 2
                result = judged(Setting(method, ratios[middle], lag, sink_size))
                if result.passes:
                    high = middle
                    if result.share < smallest and deployable(result.setting):
                        smallest, best = result.share, result.setting
                else:
                    low = middle + 1
    if best is not None and len(layers) > 1 and best.keep_ratio > ratios[0]:
        smaller = max(r for r in ratios if r < best.keep_ratio)
        ours = LagKV.parse(best.method)
        options = dict((ours and ours.arguments) or {})
        for layer in layers:
            trial = {**options, f"layer{layer}": smaller}
            setting = dataclasses.replace(best, method="lagkv-cache", options=tuple(sorted(trial.items())))
            if judged(setting).passes:
                options = trial
    return recommend(summary, tolerance=tolerance)
