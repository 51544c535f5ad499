"""A bounded number of rows: when a layer starts again from the sink (docs/method.md, section 3)."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import Tensor

from lagkv_ext.cache.settings import LayerSettings

Lengths = TypeVar("Lengths", int, Tensor)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One call of the operator: of ``rows`` rows, ``count`` partitions from ``start`` on lose tokens."""

    rows: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step does once its tokens are there: the compressions in their order, and the lengths after them."""

    passes: tuple[Pass, ...]
    rows: int
    start: int


def plan(settings: LayerSettings, rows: int, start: int) -> Plan:
    """Compress ``rows`` rows from ``start`` on if that is due, and keep them within ``settings.max_tokens``.

    The next compression comes due at ``start + 2 lag_size`` rows. Where that would be over the budget, ``start`` goes
    back to the sink size, and the next compression (with the next token, as a rule) chooses among all rows after the
    sink, as if they were a new sequence. So after every step there is room for one token at least, and tokens that
    come one by one set off one compression at most. Only many tokens at once can need several: where the rows that
    the first leaves are as many as the budget or more, the next follows at once.
    """
    passes = []
    while count := settings.compressed_count(rows, start):
        passes.append(Pass(rows, start, count))
        rows -= count * (settings.lag_size - settings.keep)
        start += count * settings.keep
        if settings.max_tokens is None:
            break
        if starts_again(start, settings.lag_size, settings.max_tokens):
            start = settings.sink_size
        if rows < settings.max_tokens:
            break
    return Plan(tuple(passes), rows, start)


def starts_again(start: Lengths, lag_size: int, max_tokens: int) -> bool | Tensor:
    """Whether ``start``, after a compression, goes back to the sink size; for an int, or elementwise for a tensor."""
    return start + 2 * lag_size > max_tokens
