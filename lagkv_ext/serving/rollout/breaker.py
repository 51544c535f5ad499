"""The circuit breaker: when quality checks say that compression has to end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from lagkv_ext.serving.rollout.policy import Guard


@dataclass(frozen=True)
class Check:
    """One request, replayed with the full and with the compressed cache along the tokens that were generated."""

    agreement: float  #: share of answer tokens where both caches have the same most likely token, in [0, 1]
    kl: float  #: mean of KL(full || compressed) over answer tokens, nats; inf where a model said no number
    tokens: int  #: answer tokens
    prompt_tokens: int
    compressed: bool = True  #: whether a token was said with rows dropped or quantised; else it says nothing


class Breaker:
    """Trips, once and for all, when the checks of a window are worse than a `Guard` allows.

    Rule. Of the last ``window`` checks, ``n`` in number, each a request and each counting the same, it trips when

        sum(1 - agreement) > max(n, min_checks) * (1 - min_agreement)    or    sum(kl) > max(n, min_checks) * max_kl.

    From ``min_checks`` on this is the plain comparison of means with the guard. Before that, checks still to come
    count as perfect: it trips as soon as no luck could save the mean at ``min_checks``. So it decides what the plain
    rule decides, only earlier, and a disaster needs no 20 checks.

    Sure: while it has not tripped and ``n >= min_checks``, the mean agreement of the window is at least
    ``min_agreement`` and the mean KL at most ``max_kl``. Worse checks never trip later: every sum only grows with a
    worse check, and sums are exact (`math.fsum`), so no rounding turns that around.

    Likely: where the guard is broken on average, how long can chance hide it? For ``n`` independent requests with
    true mean disagreement ``q > p = 1 - min_agreement``, the chance that ``n`` checks do not trip is at most
    ``exp(-n (p log(p / q) + (1 - p) log((1 - p) / (1 - q))))`` (Chernoff, which for values in [0, 1] is worst for
    zeros and ones). With ``min_agreement`` 0.97, a true agreement of 0.90 survives 200 checks with a chance below
    0.1%, one of 0.94 below 15%; and every window that follows must be survived too. The other way there is no
    promise, on purpose: the rule looks after every check, so where true quality is at the guard, chance will trip it.
    A guard belongs below what the evaluation measured, and a needless trip costs memory, not answers.
    """

    def __init__(self, guard: Guard):
        self.guard = guard
        self.reason: str | None = None  #: why it tripped; None while it has not
        self._window: deque[Check] = deque(maxlen=guard.window)

    def add(self, check: Check) -> str | None:
        """Take in a check; the reason where this is the one that trips it, None otherwise."""
        self._window.append(check)
        if self.reason is not None:
            return None
        guard, n = self.guard, len(self._window)
        base = max(n, guard.min_checks)
        early = "" if n >= guard.min_checks else f", whatever the next {guard.min_checks - n} say"
        if math.fsum(1 - x.agreement for x in self._window) > base * (1 - guard.min_agreement):
            self.reason = (
                f"agreement {self.agreement:.4f} over the last {n} checks is below "
                f"min_agreement {guard.min_agreement:g}{early}"
            )
        elif math.fsum(x.kl for x in self._window) > base * guard.max_kl:
            self.reason = (
                f"KL {self.kl:.4f} nats per token over the last {n} checks is above "
                f"max_kl {guard.max_kl:g}{early}"
            )
        return self.reason

    def recall(self, checks: Iterable[Check]) -> None:
        """Take in checks that others judged when they came. The first ones are not the first of their version, and
        would be judged as if they were: too few, and without those before them."""
        self._window.extend(checks)

    @property
    def checks(self) -> int:
        """Checks in the window."""
        return len(self._window)

    @property
    def agreement(self) -> float | None:
        """Mean over the window, each check counting the same; None without checks."""
        return math.fsum(x.agreement for x in self._window) / self.checks if self._window else None

    @property
    def kl(self) -> float | None:
        """Mean over the window in nats per token; None without checks."""
        return math.fsum(x.kl for x in self._window) / self.checks if self._window else None
