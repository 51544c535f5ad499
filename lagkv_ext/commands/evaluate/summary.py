"""Groups records into scores per setting and task, with intervals, for tables and recommendations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lagkv_ext.commands.evaluate.statistics import LEVEL, Difference, Interval, difference, mean_interval
from lagkv_ext.commands.evaluate.types import Setting

# A full cache that scores less than this above guessing has nothing to lose.
MARGIN = 0.1


@dataclass
class Cell:
    """One setting on one task."""

    interval: Interval
    loss: Difference | None  # against the full cache on the same questions; None for the full cache itself
    extra: dict[str, float]  # means of what else was measured: kl, nll, exact, ...
    tokens: float
    rows: float
    full_layer_bytes: float
    cache_bytes: float


@dataclass
class Summary:
    """Everything measured. ``cells[setting name][task]``; scores are in [0, 1]."""

    settings: dict[str, Setting] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def cell(self, setting: str, task: str) -> Cell | None:
        return self.cells.get(setting, {}).get(task)

    def silent(self) -> list[str]:
        """Tasks on which the full cache is hardly better than guessing, so that they cannot show a loss."""
        out = []
        for task in self.tasks:
            full = self.cell("full", task)
            if full is not None and full.interval.mean < full.extra.get("chance", 0.0) + MARGIN:
                out.append(task)
        return out

    @property
    def compressed(self) -> list[str]:
        """Names of all settings but the full cache."""
        return [name for name in self.settings if name != "full"]


_EXTRA = ("kl", "nll", "exact", "right", "chance")


def summarise(records: Sequence[dict[str, Any]], *, seed: int = 0) -> Summary:
    """Group records of a results file by setting and task. Order is that of the file; a repeated record counts once."""
    unique = {
        (x["task"], x["sample"], x["digest"], x["setting_name"]): x for x in records if x["kind"] == "result"
    }
    out = Summary(records=list(unique.values()), skipped=[x for x in records if x["kind"] == "skipped"])
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for x in out.records:
        name = x["setting_name"]
        out.settings.setdefault(name, Setting.from_json(x["setting"]))
        if x["task"] not in out.tasks:
            out.tasks.append(x["task"])
        grouped.setdefault(name, {}).setdefault(x["task"], []).append(x)
    for name, by_task in grouped.items():
        for task, found in by_task.items():
            scores = _scores(found)
            full = _scores(grouped.get("full", {}).get(task, []))
            common = scores.keys() & full.keys()
            loss = difference(scores, full, seed=seed) if name != "full" and common else None
            questions = [q for x in found for q in x["questions"]]
            extra = {
                k: fmean(float(q[k]) for q in questions) for k in _EXTRA if all(k in q for q in questions)
            }
            mean = {
                k: fmean(x[k] for x in found) for k in ("tokens", "rows", "full_layer_bytes", "cache_bytes")
            }
            out.cells.setdefault(name, {})[task] = Cell(mean_interval(scores, seed=seed), loss, extra, **mean)
    return out


def paired(
    summary: Summary, setting: str, base: str, task: str, *, seed: int = 0, level: float = LEVEL
) -> Difference | None:
    """``setting - base`` on the questions of ``task`` that both were asked; None where there are none."""
    one, other = (
        _scores([x for x in summary.records if x["setting_name"] == name and x["task"] == task])
        for name in (setting, base)
    )
    return difference(one, other, seed=seed, level=level) if one.keys() & other.keys() else None


def _scores(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    # A sample whose text changed between two runs is another sample, though its name is the same.
    return {f"{x['sample']} {x['digest']}": [float(q["score"]) for q in x["questions"]] for x in records}
