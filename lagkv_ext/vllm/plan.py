"""Computes the integers of LagKV in vLLM: pure arithmetic on token counts, the same in scheduler, workers and metrics.

A sequence has two block tables. The raw table is logical: token ``t`` is row ``t % block`` of entry ``t // block``,
and entries whose tokens were compressed become holes. The compressed table is append-only.

State ``k`` is the cache that the tokens ``k * boundary .. (k + 1) * boundary - 1`` attend to, whatever chunks they
come in. It has ``m(k) = max(0, (k * boundary - sink) // lag - 1)`` compressed partitions and these blocks:

    [full blocks of the sink: raw] [kept rows of partitions 0 .. m - 1: compressed] [mixed: compressed]
    [raw blocks of the tokens from sink + m * lag on]

The mixed block exists where the sink ends inside a block (``part = sink % block`` rows): the rest of the sink, then the
first ``block - part`` tokens of partition ``m``, copied. Boundary ``k`` appends to the compressed table the kept blocks
of the partitions ``m(k - 1) .. m(k) - 1``, then its mixed block. Methods that take ``k`` take ints and int64 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Sizes in tokens; ``block`` is the number of rows in a block of the cache manager."""

    sink: int
    lag: int
    keep: int
    block: int
    boundary: int

    def check(self) -> None:
        """ValueError where blocks cannot hold whole numbers of partitions and kept rows."""
        if self.lag % self.block:
            raise ValueError(
                f"lagkv: the block size must divide lag_size ({self.lag}), got {self.block} "
                f"(--block-size {_divisor(self.lag, self.block)} fits)"
            )
        if self.keep % self.block:
            below, above = self.keep // self.block * self.block, -(-self.keep // self.block) * self.block
            fits = " or ".join(
                f"{keep} (keep_ratio {keep / self.lag:g})" for keep in (below, above) if 0 < keep <= self.lag
            )
            raise ValueError(
                f"lagkv: the block size ({self.block}) must divide keep, got {self.keep}: set keep to {fits}, or use "
                f"a smaller --block-size ({_divisor(self.keep, self.block)} fits)"
            )
        if self.boundary < 1 or self.boundary % self.lag:
            raise ValueError(
                f"lagkv: boundary must be a multiple of lag_size ({self.lag}), got {self.boundary}"
            )

    # -- sizes

    @cached_property
    def part(self) -> int:
        """Rows of the sink in its last block where that is not full, else 0."""
        return self.sink % self.block

    @cached_property
    def full(self) -> int:
        """Full blocks of the sink."""
        return self.sink // self.block

    @cached_property
    def sink_blocks(self) -> int:
        """Raw blocks that a sequence never gives up."""
        return -(-self.sink // self.block)

    @cached_property
    def kept_blocks(self) -> int:
        """Blocks that hold the kept rows of one partition."""
        return self.keep // self.block

    @cached_property
    def first(self) -> int:
        """The first boundary that compresses anything."""
        return -(-(self.sink + 2 * self.lag) // self.boundary)

    # -- what is compressed in a state

    def m(self, k: Any) -> Any:
        """Compressed partitions in state ``k``."""
        return _not_negative((k * self.boundary - self.sink) // self.lag - 1)

    def rows(self, tokens: int) -> int:
        """Rows that the last of ``tokens`` tokens attends to, itself included."""
        return tokens - self.m((tokens - 1) // self.boundary) * (self.lag - self.keep) if tokens else 0

    def raw_from(self, k: int) -> int:
        """The first entry of the raw table after the sink's that state ``k`` needs."""
        m = self.m(k)
        return (self.sink + m * self.lag) // self.block if m else 0

    # -- the compressed table

    def entries(self, k: Any) -> Any:
        """Length of the compressed table in state ``k``."""
        return self.m(k) * self.kept_blocks + (_not_negative(k - self.first + 1) if self.part else 0)

    def kept_index(self, i: Any) -> Any:
        """Entry of the ``i``-th kept block: the mixed blocks of earlier boundaries lie before it."""
        if not self.part:
            return i
        reference_end = self.sink + (i // self.kept_blocks + 2) * self.lag
        return i + (reference_end + self.boundary - 1) // self.boundary - self.first

    def mixed_index(self, k: Any) -> Any:
        """Entry of the mixed block of state ``k >= first``, where there are any."""
        return self.m(k) * self.kept_blocks + (k - self.first)

    @cached_property
    def most_appended(self) -> int:
        """The most entries that one boundary appends."""
        return self.entries(self.first + 1) - self.entries(self.first)

    # -- blocks that a sequence holds

    def held(self, processed: int, tokens: int) -> tuple[int, int]:
        """Blocks (raw, compressed) of a sequence that has room for ``tokens`` and whose first ``processed`` tokens
        are through the model: the blocks that their state no longer needs are free again."""
        k, before = tokens // self.boundary, processed // self.boundary
        raw = -(-tokens // self.block) - max(0, self.raw_from(before) - self.sink_blocks)
        stale = max(0, before - self.first) if self.part else 0
        return raw, self.entries(k) - stale

    def peak(self, tokens: int, in_flight: int) -> tuple[int, int]:
        """The most blocks (raw, compressed) that a sequence of up to ``tokens`` tokens holds at any time, where up to
        ``in_flight`` of its tokens are scheduled and not processed."""
        # Raw blocks grow with the tokens and fall at the first step whose processed tokens reach a boundary. That saw
        # keeps its height from the first compressing boundary on, so two of its teeth stand for all.
        teeth = [k * self.boundary - 1 + in_flight for k in (self.first, self.first + 1)]
        raw = max(self._held_at(min(tokens, end), in_flight)[0] for end in (*teeth, tokens))
        # Compressed blocks are most when a boundary was just appended and nothing before it is processed.
        return raw, self._held_at(tokens // self.boundary * self.boundary, in_flight)[1]

    def _held_at(self, tokens: int, in_flight: int) -> tuple[int, int]:
        return self.held(max(0, tokens - in_flight), tokens)

    # -- tables

    def shown(self, raw: Tensor, compressed: Tensor, k: Tensor, width: int) -> Tensor:
        """``[P, width]``: the block table that attention is shown for states ``k [P]``, from the tables ``[P, *]``.

        Entries past a state's rows are arbitrary blocks of the tables.
        """
        i = torch.arange(width, device=raw.device).unsqueeze(0)
        k = k.unsqueeze(1)
        m = self.m(k)
        kept_end = self.full + m * self.kept_blocks
        index = torch.where(i < self.full, i, (self.sink + m * self.lag) // self.block + i - kept_end)
        blocks = raw.gather(1, index.clamp(0, raw.shape[1] - 1))
        from_compressed = (i >= self.full) & (i < kept_end)
        index = self.kept_index((i - self.full).clamp_min(0)).expand(k.shape[0], -1)
        if self.part:
            mixed = (i == kept_end) & (m > 0)
            index = torch.where(mixed, self.mixed_index(k), index)
            from_compressed = from_compressed | mixed
        kept = compressed.gather(1, index.clamp(0, compressed.shape[1] - 1))
        return torch.where(from_compressed, kept, blocks)


@dataclass(frozen=True)
class Pieces:
    """A batch's scheduled tokens cut so that all tokens of a piece see one state. int64 ``[P]``, on the CPU."""

    sequence: Tensor  #: row of the batch
    k: Tensor  #: state
    begin: Tensor  #: first token
    end: Tensor  #: one past the last token


def pieces(plan: Plan, begins: Tensor, ends: Tensor) -> Pieces:
    """The pieces of sequences that compute the tokens ``begins .. ends - 1`` (int64 ``[B]``), in order.

    States in which nothing is compressed are one. A sequence without tokens (padding of a captured batch) is one empty
    piece.
    """
    none = plan.first - 1  # the last state in which nothing is compressed, here for all of them
    first = (begins // plan.boundary).clamp_min(none)
    last = torch.maximum(first, (ends - 1) // plan.boundary)
    count = last - first + 1
    sequence = torch.arange(len(begins)).repeat_interleave(count)
    offset = (count.cumsum(0) - count)[sequence]
    k = first[sequence] + torch.arange(len(sequence)) - offset
    begin = torch.where(k > first[sequence], k * plan.boundary, begins[sequence])
    end = torch.where(k < last[sequence], (k + 1) * plan.boundary, ends[sequence])
    return Pieces(sequence, k, begin, end)


def crossings(plan: Plan, begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """``(sequence, k)`` int64 ``[C]``: the compressing boundaries that the tokens of a step complete."""
    low = torch.maximum(begins // plan.boundary + 1, torch.tensor(plan.first))
    count = (ends // plan.boundary - low + 1).clamp_min(0)
    sequence = torch.arange(len(begins)).repeat_interleave(count)
    offset = (count.cumsum(0) - count)[sequence]
    return sequence, low[sequence] + torch.arange(len(sequence)) - offset


def _not_negative(x: Any) -> Any:
    return max(0, x) if isinstance(x, int) else x.clamp_min(0)


def _divisor(size: int, limit: int) -> int:
    """The largest power of two that divides ``size`` and is at most ``limit``."""
    power = 1
    while size % (2 * power) == 0 and 2 * power <= limit:
        power *= 2
    return power
