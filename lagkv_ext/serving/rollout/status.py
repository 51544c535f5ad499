"""State of a server's rollout at one moment: for logs, health pages and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

REASONS = ("compressed", "disabled", "tripped", "share", "short_prompt", "error")


@dataclass(frozen=True)
class VariantStatus:
    """One variant of the version in force. ``decisions`` and ``checks`` count what this process did since its `Rollout`
    was made; the other fields are of the version in force, by the checks of all processes."""

    share: float  #: of all requests, in [0, 1]; what the file says, also where nothing is compressed
    tripped: bool
    decisions: dict[str, int]  #: requests by reason; every name in `REASONS` is there
    checks: int  #: quality checks of requests that really were compressed
    agreement: float | None  #: mean over the guard's window, in [0, 1]; None before the first check
    agreement_at_least: (
        float | None
    )  #: lower bound at every moment (`Judge.bounds`); None before the first check
    agreement_at_most: float | None  #: upper bound
    kl: float | None  #: mean over the window, nats per token; None before the first check
    rung: int | None = None  #: of the ladder, 0 for the largest cache; None where this variant has none
    samples: int = 0  #: stored for review, of all versions
    reviews: dict[str, int] = field(default_factory=dict)  #: verdicts of people, by verdict


@dataclass(frozen=True)
class RolloutStatus:
    """`Rollout.status`. ``check_errors``, ``failures`` and ``reload_errors`` count what this process did since its
    `Rollout` was made: they only grow, and add up over processes."""

    version: int
    enabled: bool
    variants: dict[str, VariantStatus]  #: by name; "full" has decisions alone
    check_errors: int  #: checks that failed
    failures: int  #: requests that failed with a compressed cache, as the server told `Rollout.failed`
    unusable: bool  #: whether the rollout file, or the record of a trip, is there and cannot be used
    reload_errors: int  #: contents of these files that could not be used, each counted once
