"""Rollout policies for the tests: strategies, and small ones for the tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Breaker, Check, Guard, Policy, Store
from tests.cache.models import SMALL

SHARES = st.floats(0, 1)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "lag_size": st.integers(2, 64),
        "keep_ratio": st.floats(1 / 16, 1),
        "score": st.sampled_from(["std", "cosine"]),
        "layer_keep_ratio": st.dictionaries(st.integers(-3, 3), st.floats(1 / 16, 1), max_size=2),
        "skip_layers": st.lists(st.integers(0, 2), max_size=2),
    },
)
GUARDS = st.builds(
    lambda low, more, **rest: Guard(min_checks=low, window=low + more, **rest),
    low=st.integers(1, 12),
    more=st.integers(0, 12),
    min_agreement=st.floats(0.01, 1),
    max_kl=st.floats(1e-6, 10),
    check_share=SHARES,
    max_errors=st.none() | st.integers(1, 99),
)
POLICIES = st.builds(
    Policy,
    version=st.just(1),
    enabled=st.booleans(),
    share=SHARES,
    settings=SETTINGS,
    min_prompt_tokens=st.integers(0, 10**6),
    guard=GUARDS,
)
CHECKS = st.builds(
    Check,
    agreement=st.floats(0, 1),
    kl=st.floats(0, 30) | st.just(float("inf")),
    tokens=st.integers(1, 999),
    prompt_tokens=st.integers(1, 999),
)


def policy(ratio: float = 0.25, **changes: Any) -> Policy:
    """Every request, compressed every 8 tokens, every one checked; 3 checks are enough."""
    guard = Guard(min_checks=3, window=10, check_share=1.0)
    return dataclasses.replace(Policy(1, True, 1.0, {**SMALL, "keep_ratio": ratio}, 0, guard), **changes)


def stored(folder: Path, made: Policy | None = None) -> Store:
    """A rollout file with version 1."""
    store = Store(folder / "lagkv-rollout.json")
    store.write(lambda old: made or policy())
    return store


def tripped_at(guard: Guard, checks: list[Check]) -> int:
    """How many checks it takes; one more than there are where it never trips."""
    breaker = Breaker(guard)
    for i, check in enumerate(checks, 1):
        breaker.add(check)
        if breaker.reason is not None:
            return i
    return len(checks) + 1
