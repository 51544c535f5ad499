"""Rollout policies for the tests: strategies, and small ones for the tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Check, Guard, LadderRules, Policy, Samples, Store, Variant
from lagkv_ext.serving.rollout.policy import MAIN, Written
from tests.cache.models import SMALL

SHARES = st.floats(0, 1)
LEVELS = st.floats(1e-6, 0.5)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,31}", fullmatch=True).filter(lambda x: x != "full")
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
    Guard,
    min_agreement=st.floats(0.01, 1),
    max_kl=st.floats(1e-6, 10),
    level=LEVELS,
    recover=st.booleans(),
    window=st.integers(1, 24),
    check_share=SHARES,
    max_errors=st.none() | st.integers(1, 99),
)
WRITTEN = st.builds(
    Written,
    by=st.sampled_from(["operator", "ladder", "guard"]),
    time=st.text(max_size=9),
    why=st.text(max_size=9),
    evidence=st.none()
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=2),
)


@st.composite
def variants(draw: st.DrawFn) -> dict[str, Variant]:
    """One to four, the main one alone or any names."""
    if draw(st.booleans()):
        return {MAIN: Variant(draw(SHARES), draw(SETTINGS))}
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    parts = draw(st.lists(SHARES, min_size=len(names), max_size=len(names)))
    scale = max(sum(parts), 1)
    return {name: Variant(part / scale, draw(SETTINGS)) for name, part in zip(names, parts, strict=True)}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    guard, chosen = draw(GUARDS), draw(variants())
    ladder = None
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(chosen)))
        others = draw(st.lists(SETTINGS, max_size=3, unique_by=lambda x: repr(sorted(x.items()))))
        rungs = [x for x in others if x != chosen[name].settings]
        rungs.insert(draw(st.integers(0, len(rungs))), dict(chosen[name].settings))
        ladder = LadderRules(
            tuple(rungs),
            name,
            draw(st.floats(guard.min_agreement, 1)),
            draw(LEVELS),
            draw(st.integers(1, 9)),
            draw(st.floats(0, 1e6)),
        )
    samples = draw(
        st.none() | st.builds(Samples, SHARES, st.integers(1, 99), st.text(min_size=1, max_size=9))
    )
    return Policy(
        1,
        draw(st.booleans()),
        chosen,
        draw(st.integers(0, 10**6)),
        guard,
        ladder,
        samples,
        draw(st.none() | WRITTEN),
    )


POLICIES = policies()
CHECKS = st.builds(
    Check,
    agreement=st.floats(0, 1),
    kl=st.floats(0, 30) | st.just(float("inf")),
    tokens=st.integers(1, 999),
    prompt_tokens=st.integers(1, 999),
    variant=st.sampled_from([MAIN, "eighth"]),
    shadow=st.booleans(),
)


def policy(ratio: float = 0.25, *, share: float = 1.0, settings: Any = None, **changes: Any) -> Policy:
    """Every request, compressed every 8 tokens, every one checked."""
    guard = Guard(window=10, check_share=1.0)
    variant = Variant(share, {**SMALL, "keep_ratio": ratio} if settings is None else settings)
    return dataclasses.replace(Policy(1, True, {MAIN: variant}, 0, guard), **changes)


def stored(folder: Path, made: Policy | None = None) -> Store:
    """A rollout file with version 1."""
    store = Store(folder / "lagkv-rollout.json")
    store.write(lambda old: made or policy())
    return store
