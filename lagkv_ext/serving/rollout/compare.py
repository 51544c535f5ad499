"""Differences between variants, with intervals that may be looked at at any time.

The interval of a difference of two means is an asymptotic confidence sequence: Waudby-Smith, Arbour, Sinha, Kennedy &
Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", Annals of Statistics 52(6), 2024,
arXiv:2103.06476, with their Gaussian mixture boundary. With ``n`` numbers in all and ``se`` the standard error of the
difference, its half width is

    se * sqrt(2 (n rho^2 + 1) / (n rho^2) * log(sqrt(n rho^2 + 1) / level)),

which holds for all n at once as n grows, for distributions with finite variance. ``rho`` makes it narrowest near
`_NARROWEST` numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.judge import Check
from lagkv_ext.serving.rollout.policy import FULL, Policy, RolloutError
from lagkv_ext.serving.rollout.store import Store
from lagkv_ext.user_files import decode

_NARROWEST = 500
_FEWEST = 30  #: of each variant; below that the normal limit says nothing
#: Name, unit, whether a smaller one is better.
METRICS = (
    ("agreement", "", False),
    ("kl", "nats per token", True),
    ("duration_s", "s", True),
    ("bytes_held", "bytes", True),
)


@dataclass(frozen=True)
class Difference:
    """``second`` minus ``first`` in one metric."""

    metric: str
    first: str
    second: str
    counts: tuple[int, int]
    means: tuple[float | None, float | None]
    low: float | None  #: of the interval of the difference; None where there are too few numbers
    high: float | None

    @property
    def verdict(self) -> str:
        """ "too few", "noise", "lower" or "higher"."""
        if self.low is None or self.high is None:
            return "too few"
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "noise"


def difference(
    metric: str, names: tuple[str, str], values: tuple[Sequence[float], Sequence[float]], level: float
) -> Difference:
    """Difference of two samples. Infinite numbers count as too few: a mean of them is no number."""
    counts = len(values[0]), len(values[1])
    means = tuple(math.fsum(x) / len(x) if x else None for x in values)
    shown = tuple(None if x is None or not math.isfinite(x) else x for x in means)
    low = high = None
    if min(counts) >= _FEWEST and None not in shown:
        error = math.sqrt(sum(_variance(x) / len(x) for x in values))
        between, width = means[1] - means[0], error * _boundary(sum(counts), level)  # type: ignore[operator]
        low, high = between - width, between + width
    return Difference(metric, *names, counts, shown, low, high)  # type: ignore[arg-type]


def _boundary(count: int, level: float) -> float:
    """Half-width of the interval in standard errors."""
    rho2 = (-2 * math.log(level) + math.log(1 - 2 * math.log(level))) / _NARROWEST
    scaled = count * rho2 + 1
    return math.sqrt(2 * scaled / (count * rho2) * math.log(math.sqrt(scaled) / level))


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)


@dataclass
class Observations:
    """Numbers by metric and variant, and what was left out."""

    values: dict[str, dict[str, list[float]]]
    left_out: list[str]


def observe(store: Store, policy: Policy, logs: Iterable[Path]) -> Observations:
    """The checks and the logged requests of the variants in force.

    Checks are those of the version in force and of the versions before it in which a variant had the same settings.
    Logged requests count where they completed, were eligible for compression, and had these settings or the full cache.
    Raises OSError and RolloutError.
    """
    names = [*policy.variants, FULL]
    found = Observations({metric: {name: [] for name in names} for metric, _, _ in METRICS}, [])
    for check in _checks(store, policy):
        found.values["agreement"][check.variant].append(check.agreement)
        found.values["kl"][check.variant].append(check.kl)
    for path in logs:
        _read_log(path, policy, found)
    return found


def _checks(store: Store, policy: Policy) -> Iterable[Check]:
    going = dict(policy.variants)
    for number in [policy.version, *(x for x in reversed(store.versions()) if x < policy.version)]:
        if number != policy.version:
            try:
                earlier = store.version(number)
            except RolloutError:
                return
            going = {
                name: variant
                for name, variant in going.items()
                if name in earlier.variants and earlier.variants[name].settings == variant.settings
            }
        if not going:
            return
        for check in Evidence(store.checks_of(number)).new():
            if check.variant in going and not check.shadow:
                yield check


def _read_log(path: Path, policy: Policy, found: Observations) -> None:
    damaged = 0
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(decode(line, str(path)))
        except ValueError:
            damaged += 1
            continue
        if not isinstance(record, dict) or record.get("event") != "request":
            continue
        name = record.get("variant")
        if name not in found.values["duration_s"] or record.get("outcome") != "completed":
            continue
        if record.get("eligible") is not True or not _is_served(record, name, policy):
            continue
        for metric in ("duration_s", "bytes_held"):
            value = record.get(metric)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found.values[metric][name].append(float(value))
    if damaged:
        found.left_out.append(f"{damaged} damaged lines of {path}")


def _is_served(record: Mapping[str, Any], name: str, policy: Policy) -> bool:
    """Tells whether the request got the cache of its variant with the present settings, and did not fall back."""
    if name == FULL:
        return record.get("reason") == "share"
    settings = json.loads(json.dumps(dict(policy.variants[name].settings)))
    return record.get("reason") == "compressed" and record.get("settings") == settings


def differences(found: Observations, level: float) -> list[Difference]:
    """Pairs of variants that have numbers, `FULL` first; agreement and KL are against the full cache already."""
    out = []
    for metric, _, _ in METRICS:
        names = [name for name, values in found.values[metric].items() if values]
        names.sort(key=lambda name: name != FULL)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                values = found.values[metric][first], found.values[metric][second]
                out.append(difference(metric, (first, second), values, level))
    return out


def sign_test(better: int, worse: int) -> float:
    """The two-sided p-value of so many verdicts for one answer and against it, by an exact binomial test."""
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / 2**count
    return min(1.0, 2 * tail)
