"""What a server says about its rollout at one moment: for logs, health pages and metrics."""

from __future__ import annotations

from dataclasses import dataclass

REASONS = ("compressed", "disabled", "tripped", "share", "short_prompt", "error")


@dataclass(frozen=True)
class RolloutStatus:
    """`Rollout.status`. ``decisions``, ``checks``, ``check_errors``, ``failures`` and ``reload_errors`` count what this
    process did since its `Rollout` was made: they only grow, and add up over processes. The other fields are those of
    the version in force, and of the files as they were at the last look.
    """

    version: int
    enabled: bool
    share: float  #: of all requests, in [0, 1]; what the file says, also where nothing is compressed
    tripped: bool
    decisions: dict[str, int]  #: requests by reason; every name in `REASONS` is there
    checks: int  #: quality checks of requests that really were compressed
    agreement: (
        float | None
    )  #: mean over the breaker's window of this version, in [0, 1]; None before the first check
    kl: float | None  #: mean over the same window, nats per token; None before the first check
    check_errors: int  #: checks that failed
    failures: int  #: requests of which `Rollout.failed` was told that they failed with a compressed cache
    unusable: bool  #: whether the rollout file, or the record of a trip, is there and cannot be used
    reload_errors: int  #: contents of the file that could not be used, each counted once
