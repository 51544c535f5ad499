"""Judges a variant by its quality checks: whether it must stop, may come back, or may move along a ladder."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from lagkv_ext.serving.rollout.policy import MAIN, Guard
from lagkv_ext.serving.rollout.sequence import MeanAbove, ShareBounds

#: That a mean KL is below a bound can only be shown of numbers that end somewhere: so many times the bound.
_KL_CUT = 4.0


@dataclass(frozen=True)
class Check:
    """One request, replayed with the full and with the compressed cache along the tokens that were generated."""

    agreement: float  #: share of answer tokens where both caches have the same most likely token, in [0, 1]
    kl: float  #: mean of KL(full || compressed) over answer tokens, nats; inf where a model gave no number
    tokens: int  #: answer tokens
    prompt_tokens: int
    compressed: bool = (
        True  #: whether a token was generated with rows dropped or quantised; else it does not count
    )
    variant: str = MAIN
    shadow: bool = False  #: whether the request itself got the full cache, since its variant had tripped


class Judge:
    """Takes in the checks of one variant in one version and judges them by a `Guard`.

    Each check is a request, and each counts the same. All answers hold at every moment: nobody has to decide in
    advance how many checks there will be, and looking often costs nothing (`sequence` has the method and the proof).

    `trip_reason`: the upper bound of the mean agreement fell below ``min_agreement``, or the lower bound of the mean
    KL rose above ``max_kl``, each at half the ``level``. Where each request, given those before it, has an expected
    agreement of at least ``min_agreement`` and an expected KL of at most ``max_kl``, that ever happens with a
    probability of at most ``level``. How soon it happens otherwise is in docs/operations.md.

    `has_recovered`: the same the other way round, from checks of requests that got the full cache after a trip. A
    mean KL is only ever shown to be small where large numbers count as four times ``max_kl``.

    ``target``: an agreement for `is_above_target` and `is_below_target`, by which a ratio adapts.
    """

    def __init__(self, guard: Guard, target: float | None = None):
        self.guard, self.target = guard, target
        exact = [guard.min_agreement, *([] if target is None else [target])]
        self.served = ShareBounds(exact)
        self.shadow = ShareBounds(exact)
        self._kl = MeanAbove([guard.max_kl], restarts=True)
        self._kl_room = MeanAbove([1 - 1 / _KL_CUT], restarts=False)
        self._window: deque[Check] = deque(maxlen=guard.window)

    def add(self, check: Check) -> None:
        self._window.append(check)
        if check.shadow:
            self.shadow.add(check.agreement)
            most = _KL_CUT * self.guard.max_kl
            self._kl_room.add(1 - min(check.kl, most) / most)
        else:
            self.served.add(check.agreement)
            self._kl.add(check.kl)

    # -- verdicts

    def trip_reason(self) -> str | None:
        """Why the variant must stop; None where it need not."""
        guard, level = self.guard, self.guard.level / 2
        if self.served.is_below(guard.min_agreement, level):
            return (
                f"agreement is below min_agreement {guard.min_agreement:g}: {self._shown('agreement')}, after "
                f"{self.served.count} checks"
            )
        if self._kl.peak[0] >= 1 / level:
            return f"KL is above max_kl {guard.max_kl:g}: {self._shown('kl')}, after {self._kl.count} checks"
        return None

    def has_recovered(self) -> bool:
        """Tells whether checks after the trip show that both bounds are kept."""
        level = self.guard.level / 2
        return self.shadow.is_above(self.guard.min_agreement, level) and bool(
            self._kl_room.evidence[0] >= 1 / level
        )

    def has_failed(self) -> bool:
        """Tells whether checks before the trip, or after it, show that a bound is not kept."""
        level = self.guard.level / 2
        return self.trip_reason() is not None or self.shadow.is_below(self.guard.min_agreement, level)

    def is_below_target(self, level: float) -> bool:
        return self.target is not None and self.served.is_below(self.target, level)

    def is_above_target(self, level: float) -> bool:
        return self.target is not None and self.served.is_above(self.target, level)

    # -- numbers

    @property
    def checks(self) -> int:
        """All checks of this version."""
        return self.served.count + self.shadow.count

    @property
    def in_window(self) -> int:
        return len(self._window)

    @property
    def agreement(self) -> float | None:
        """Mean over the window, each check counting the same; None without checks."""
        return math.fsum(x.agreement for x in self._window) / len(self._window) if self._window else None

    @property
    def kl(self) -> float | None:
        """Mean over the window in nats per token; None without checks."""
        return math.fsum(x.kl for x in self._window) / len(self._window) if self._window else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper bound of the mean agreement of served requests; None before the first check.

        Each is ever wrong with a probability of at most half the guard's ``level``.
        """
        return self.served.bounds(self.guard.level / 2) if self.served.count else None

    def numbers(self) -> dict[str, Any]:
        """For records: what is known now."""
        found = self.shadow if self.shadow.count else self.served
        low, high = found.bounds(self.guard.level / 2)
        kl = self.kl if self.kl is not None and math.isfinite(self.kl) else None
        return {
            "checks": self.checks,
            "agreement": self.agreement,
            "agreement_at_least": low,
            "agreement_at_most": high,
            "kl": kl,
        }

    def _shown(self, name: str) -> str:
        mean = self.agreement if name == "agreement" else self.kl
        unit = "" if name == "agreement" else " nats per token"
        return f"mean {mean:.4f}{unit} over the last {self.in_window}"
