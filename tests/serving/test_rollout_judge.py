"""Judgement of a variant by checks: it trips, comes back and moves on evidence, and says why."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("numpy", reason="random numbers come from numpy")
pytest.importorskip("transformers", reason="the rollout needs transformers")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Check, Guard, Judge
from tests.serving.rollout_cases import CHECKS, GUARDS

RUNS = st.lists(CHECKS, max_size=40)


def judged(guard: Guard, checks: list[Check], target: float | None = None) -> Judge:
    judge = Judge(guard, target)
    for check in checks:
        judge.add(check)
    return judge


def checks_of(agreements: list[float], kl: float = 0.0, shadow: bool = False) -> list[Check]:
    return [Check(x, kl, 50, 1000, shadow=shadow) for x in agreements]


def tripped_at(guard: Guard, checks: list[Check]) -> int:
    """Counts checks until it trips; one more than there are where it never does."""
    judge = Judge(guard)
    for i, check in enumerate(checks, 1):
        judge.add(check)
        if judge.trip_reason() is not None:
            return i
    return len(checks) + 1


@given(GUARDS, RUNS, st.data())
def test_worse_checks_never_trip_later(guard, checks, data):
    worse = [
        Check(
            data.draw(st.floats(0, x.agreement)),
            x.kl + data.draw(st.floats(0, 5) | st.just(math.inf)),
            x.tokens,
            x.prompt_tokens,
            shadow=x.shadow,
        )
        for x in checks
    ]
    assert tripped_at(guard, worse) <= tripped_at(guard, checks)


@given(GUARDS, RUNS, RUNS)
def test_a_reason_stays(guard, bad, good):
    judge = judged(guard, bad)
    tripped = judge.trip_reason() is not None
    for check in good:
        judge.add(check)
    assert judge.trip_reason() is not None or not tripped


@given(GUARDS, RUNS)
def test_checks_after_a_trip_do_not_trip_and_those_before_it_do_not_recover(guard, checks):
    served = [x for x in checks if not x.shadow]
    assert judged(guard, checks).trip_reason() is None or tripped_at(guard, served) <= len(served)
    assert not judged(guard, served).has_recovered()


@given(GUARDS, RUNS)
def test_numbers_are_means_of_the_window(guard, checks):
    judge = judged(guard, checks)
    window = checks[-guard.window :]
    assert (judge.checks, judge.in_window) == (len(checks), len(window))
    if not checks:
        assert (judge.agreement, judge.kl) == (None, None)
        return
    assert judge.agreement == pytest.approx(sum(x.agreement for x in window) / len(window))
    numbers = judge.numbers()
    assert 0 <= numbers["agreement_at_least"] <= 1
    assert (numbers["kl"] is None) == any(math.isinf(x.kl) for x in window)


def test_a_disaster_needs_few_checks_and_names_its_bound():
    assert tripped_at(Guard(), checks_of([0.5] * 9)) <= 4
    judge = judged(Guard(), checks_of([0.5] * 9))
    assert judge.trip_reason() == (
        "agreement is below min_agreement 0.97: mean 0.5000 over the last 9, after 9 checks"
    )
    found = judged(Guard(), checks_of([1.0] * 9, kl=5.0))
    assert (
        found.trip_reason()
        == "KL is above max_kl 0.1: mean 5.0000 nats per token over the last 9, after 9 checks"
    )
    assert tripped_at(Guard(), checks_of([1.0], kl=math.inf)) == 1


def test_a_guard_of_one_allows_no_other_token():
    guard = Guard(min_agreement=1.0)
    assert tripped_at(guard, checks_of([1.0] * 200)) == 201
    assert tripped_at(guard, checks_of([1.0] * 5 + [0.98])) == 6


@pytest.mark.parametrize("level", [0.2, 0.05])
def test_false_trips_are_rarer_than_the_level(level):
    """Agreement and KL both exactly at the guard, looked at after every check; fixed seeds, so a fixed result."""
    generator, trips, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        agreement = generator.binomial(50, 0.97, 250) / 50
        kl = generator.exponential(0.1, 250)
        checks = [Check(float(a), float(k), 50, 9) for a, k in zip(agreement, kl, strict=True)]
        trips += judged(Guard(level=level), checks).trip_reason() is not None
    assert trips / runs <= level


def test_recovery_needs_evidence_for_both_bounds():
    guard = Guard(recover=True)
    good = checks_of([1.0] * 400, shadow=True)
    needed = next(n for n in range(1, 400) if judged(guard, good[:n]).has_recovered())
    assert 100 < needed < 300  # 0.97 cannot be told from 1 sooner
    assert not judged(guard, checks_of([1.0] * 400, kl=0.2, shadow=True)).has_recovered()
    assert not judged(guard, checks_of([0.96] * 400, shadow=True)).has_recovered()
    assert not judged(guard, checks_of([1.0] * 400)).has_recovered()  # of requests that were compressed


def test_false_recoveries_are_rarer_than_the_level():
    generator, back, runs = np.random.default_rng(1), 0, 200
    for _ in range(runs):
        found = [float(x) for x in generator.binomial(50, 0.97, 300) / 50]
        back += judged(Guard(level=0.2, recover=True), checks_of(found, shadow=True)).has_recovered()
    assert back / runs <= 0.2


def test_targets():
    above = judged(Guard(), checks_of([1.0] * 300), target=0.98)
    assert above.is_above_target(0.05)
    assert not above.is_below_target(0.05)
    below = judged(Guard(), checks_of([0.975] * 300), target=0.99)
    assert below.is_below_target(0.05)
    assert not below.is_above_target(0.05)
    assert below.trip_reason() is None
    none = judged(Guard(), checks_of([1.0] * 300))
    assert not none.is_above_target(0.5)
    assert not none.is_below_target(0.5)
