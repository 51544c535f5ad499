"""The circuit breaker: what it promises, for any checks and any guard."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

from hypothesis import example, given
from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Breaker, Check, Guard
from tests.serving.rollout_cases import CHECKS, GUARDS, tripped_at

RUNS = st.lists(CHECKS, max_size=40)


def plain_rule(guard: Guard, checks: list[Check]) -> int:
    """Means of the window against the guard, from ``min_checks`` on, in exact arithmetic."""
    for n in range(guard.min_checks, len(checks) + 1):
        window = checks[max(0, n - guard.window) : n]
        lost = sum(Fraction(1 - x.agreement) for x in window) / len(window)
        infinite = any(math.isinf(x.kl) for x in window)
        if infinite or lost > Fraction(1 - guard.min_agreement):
            return n
        if sum(Fraction(x.kl) for x in window) / len(window) > Fraction(guard.max_kl):
            return n
    return len(checks) + 1


@given(GUARDS, RUNS)
@example(Guard(min_agreement=0.97, min_checks=20), [Check(0.97, 0.1, 1, 1)] * 200)
def test_decides_what_the_plain_rule_decides_and_never_later(guard, checks):
    ours, plain = tripped_at(guard, checks), plain_rule(guard, checks)
    assert ours <= plain
    if ours >= guard.min_checks:
        assert ours == plain
    elif len(checks) >= guard.min_checks:
        # Early only where nothing could have come that saves it: not even perfect checks.
        perfect = checks[:ours] + [Check(1.0, 0.0, 1, 1)] * (guard.min_checks - ours)
        assert plain_rule(guard, perfect) == guard.min_checks


@given(GUARDS, RUNS, st.data())
def test_worse_checks_never_trip_later(guard, checks, data):
    worse = [
        Check(
            data.draw(st.floats(0, x.agreement)),
            x.kl + data.draw(st.floats(0, 5) | st.just(math.inf)),
            x.tokens,
            x.prompt_tokens,
        )
        for x in checks
    ]
    assert tripped_at(guard, worse) <= tripped_at(guard, checks)


@given(GUARDS, RUNS, RUNS)
def test_stays_tripped_and_says_so_once(guard, bad, good):
    breaker = Breaker(guard)
    said = [x for check in bad if (x := breaker.add(check)) is not None]
    reason = breaker.reason
    assert said == ([] if reason is None else [reason])
    if reason is not None:
        assert [breaker.add(x) for x in good] == [None] * len(good)
        assert breaker.reason == reason


@given(GUARDS, RUNS)
def test_what_it_promises_while_it_has_not_tripped(guard, checks):
    breaker = Breaker(guard)
    for check in checks:
        breaker.add(check)
    assert breaker.checks == min(len(checks), guard.window)
    if breaker.reason is None and len(checks) >= guard.min_checks:
        assert breaker.agreement >= guard.min_agreement - 1e-12
        assert breaker.kl <= guard.max_kl * (1 + 1e-12)


def test_the_chance_in_its_docstring():
    """Zeros and ones, which are worst for the bound, at 0.90 and 0.94 against a guard of 0.97: exact binomials."""
    for agreement, bound in ((0.90, 0.001), (0.94, 0.15)):
        q, allowed = 1 - agreement, 6  # of 200 at 0.03
        hidden = sum(math.comb(200, k) * q**k * agreement ** (200 - k) for k in range(allowed + 1))
        p = 1 - 0.97
        chernoff = math.exp(-200 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))))
        assert hidden <= chernoff < bound


def test_the_reason_has_the_numbers():
    breaker = Breaker(Guard(min_checks=2, window=3))
    assert breaker.add(Check(0.99, 0.0, 5, 5)) is None
    assert breaker.add(Check(0.9, 0.0, 5, 5)) == (
        "agreement 0.9450 over the last 2 checks is below min_agreement 0.97"
    )
    breaker = Breaker(Guard(min_checks=20))
    assert breaker.add(Check(1.0, 2.5, 5, 5)) == (
        "KL 2.5000 nats per token over the last 1 checks is above max_kl 0.1, whatever the next 19 say"
    )
