"""Plans of compressions: the lengths before and after, known before any row moves (docs/method.md, Recursion)."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import Tensor

from lagkv_ext.cache.settings import LayerSettings

Lengths = TypeVar("Lengths", int, Tensor)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One call of the operator: of ``rows`` rows, ``count`` partitions from ``start`` on lose tokens. Of the rows
    chosen then, the ``shed`` with the lowest scores go too."""

    rows: int
    start: int
    count: int
    shed: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The compressions that a step sets off, in their order, and the lengths after them."""

    passes: tuple[Pass, ...]
    rows: int
    start: int


def plan(settings: LayerSettings, rows: int, start: int) -> Plan:
    """Compressions of ``rows`` rows from ``start`` on, as many as keep them within ``settings.max_tokens``.

    The next compression comes due at ``start + 2 lag_size`` rows. Where that exceeds the budget, ``start`` returns to
    the sink size, and the next compression (as a rule with the next token) chooses among all rows after the sink, as
    if they were a new sequence. So after every step at least one token fits, and tokens given one by one set off at
    most one compression. Only many tokens at once can need several: where the first leaves as many rows as the budget
    or more, the next follows at once.

    Rows that carry their scores never start again: those beyond ``settings.most_chosen`` are shed.
    """
    passes = []
    while count := settings.compressed_count(rows, start):
        chosen = start - settings.sink_size + count * settings.keep
        shed = max(0, chosen - most) if (most := settings.most_chosen) is not None else 0
        passes.append(Pass(rows, start, count, shed))
        rows -= count * (settings.lag_size - settings.keep) + shed
        start += count * settings.keep - shed
        if settings.max_tokens is None or settings.carries_scores:
            break
        if starts_again(start, settings.lag_size, settings.max_tokens):
            start = settings.sink_size
        if rows < settings.max_tokens:
            break
    return Plan(tuple(passes), rows, start)


def starts_again(start: Lengths, lag_size: int, max_tokens: int) -> bool | Tensor:
    """Tells whether ``start`` returns to the sink size after a compression; for an int, or elementwise for a tensor."""
    return start + 2 * lag_size > max_tokens
