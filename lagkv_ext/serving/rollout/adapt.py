"""Versions that servers write by themselves: a variant comes back after a trip, a ratio moves along its ladder."""

from __future__ import annotations

import calendar
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lagkv_ext.serving.rollout.judge import Judge
from lagkv_ext.serving.rollout.policy import LadderRules, Policy, RolloutError, Written, rung_of
from lagkv_ext.serving.rollout.store import Store, Trip, now
from lagkv_ext.serving.rollout.watch import Force

_DAY_S = 86400.0
_MOST_DOUBLINGS = 6
#: Versions of the history that are looked through, from the newest on.
_MOST_VERSIONS = 500


class Overtaken(Exception):
    """Somebody wrote another version meanwhile; nothing was written."""


@dataclass(frozen=True)
class Move:
    """A version to be written, which differs in one variant or in nothing."""

    variant: str
    settings: Mapping[str, Any]
    by: str  #: "guard" or "ladder"
    why: str
    evidence: Mapping[str, Any]
    larger: bool = False  #: whether it makes the cache larger since the checks were bad
    probation: bool = False  #: whether the variant gets no request until checks show that it may


def next_move(store: Store, force: Force, judges: Mapping[str, Judge]) -> Move | None:
    """The move that the checks ask for, the safest first. OSError where the history cannot be read."""
    policy = force.policy
    if not policy.enabled:
        return None
    for name, judge in judges.items():
        if force.may_recover(name) and (move := _after_trip(policy, name, judge)):
            return move
    ladder = policy.ladder
    if ladder is None or force.has_tripped(ladder.variant):
        return None
    judge, rung = judges[ladder.variant], rung_of(policy)
    if rung is None:
        return None
    target = f"target_agreement {ladder.target_agreement:g}"
    if rung > 0 and judge.is_below_target(ladder.level):
        return _along(policy, ladder, judge, rung, rung - 1, f"agreement is below {target}", larger=True)
    smaller = rung + 1 < len(ladder.rungs) and judge.is_above_target(ladder.level)
    if smaller and may_shrink(store, ladder, rung + 1):
        return _along(policy, ladder, judge, rung, rung + 1, f"agreement is above {target}")
    return None


def _after_trip(policy: Policy, name: str, judge: Judge) -> Move | None:
    settings = policy.variants[name].settings
    if judge.has_recovered():
        why = f"{name} has recovered: checks without requests are within the guard"
        return Move(name, settings, "guard", why, judge.numbers())
    ladder, rung = policy.ladder, rung_of(policy)
    if ladder is not None and ladder.variant == name and rung and judge.has_failed():
        why = f"{name} is below the guard: a larger cache is tried on checks alone"
        return _along(policy, ladder, judge, rung, rung - 1, why, larger=True, probation=True)
    return None


def _along(
    policy: Policy, ladder: LadderRules, judge: Judge, rung: int, to: int, why: str, **more: bool
) -> Move:
    evidence = {**judge.numbers(), "from_rung": rung, "to_rung": to}
    if more.get("larger"):
        evidence["failed"] = dict(ladder.rungs[rung])
    return Move(ladder.variant, ladder.rungs[to], "ladder", f"{why}: rung {rung} to {to}", evidence, **more)


def may_shrink(store: Store, ladder: LadderRules, to: int, seconds: float | None = None) -> bool:
    """Tells whether a move to the smaller cache of a rung is allowed now, by the times in the history.

    Not beyond ``smaller_per_day`` moves in 24 hours; not to a rung that failed within ``hold_hours``, twice as long
    after the second failure, and so on. A time in the future, as after a clock was set back, counts as now.
    """
    seconds = time.time() if seconds is None else seconds
    settings, failures, last_failure, smaller = dict(ladder.rungs[to]), 0, 0.0, 0
    numbers = store.versions()
    for number in reversed(numbers[-_MOST_VERSIONS:]):
        try:
            written = store.version(number).written
        except RolloutError:
            continue
        if written is None or written.by != "ladder" or not isinstance(written.evidence, Mapping):
            continue
        age = seconds - min(_seconds(written.time, seconds), seconds)
        failed, begin, end = (written.evidence.get(x) for x in ("failed", "from_rung", "to_rung"))
        if failed == _as_json(settings):
            last_failure = age if failures == 0 else min(age, last_failure)
            failures += 1
        if isinstance(begin, int) and isinstance(end, int) and end > begin and age < _DAY_S:
            smaller += 1
    if smaller >= ladder.smaller_per_day:
        return False
    hold_s = 3600 * ladder.hold_hours * 2 ** min(failures - 1, _MOST_DOUBLINGS)
    return failures == 0 or last_failure >= hold_s


def write(store: Store, policy: Policy, move: Move) -> None:
    """Write a move from the version in force. Overtaken, OSError, RolloutError."""

    def make(old: Policy | None) -> Policy:
        if old is None or old.version != policy.version or old.content != policy.content:
            raise Overtaken
        changed = old.changed(move.variant, settings=move.settings)
        return dataclasses.replace(changed, written=Written(move.by, now(), move.why, move.evidence))

    trip = None
    if move.probation:
        trip = Trip(policy.version, move.why, now(), os.getpid(), variant=move.variant, by="probation")
    store.write(make, anew=(move.variant,), probation=trip)


def _seconds(text: str, otherwise: float) -> float:
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:  # edited by hand: as if it were now, which holds moves back
        return otherwise


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file, where numbers of layers are text."""
    return json.loads(json.dumps(dict(settings)))
