"""Lengths of a cache and positions of its rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from lagkv_ext import arguments, formulas
from lagkv_ext.cache.compression.plan import Pass, Plan, plan
from lagkv_ext.cache.settings import LayerSettings


class Track:
    """Lengths and positions of the rows of sequences that are compressed together.

    Two lengths, never mixed: ``seen`` is the number of tokens given (positions count it), ``rows`` the number of rows
    held. Rows come in this order: the sink; the rows that compressions chose; the most recent tokens, all of them.
    The next compression spares the rows before ``start``: the sink and the chosen rows, or (once a budget has made it
    start again) the sink alone. With ``settings.carries_scores`` the chosen rows compete with the new ones, by the
    scores that they were chosen by.
    """

    def __init__(self, settings: LayerSettings):
        self.settings = settings
        self.seen = 0
        self.rows = 0
        self.start = settings.sink_size
        self.compressions = 0
        self.chosen: Tensor | None = None  #: int32 [B, H, n]: positions of the rows that compressions chose
        self.scores: Tensor | None = None  #: [B, H, n] of those rows, where they are carried
        self._chosen_count = 0  # n, known before the rows are compressed

    @classmethod
    def of_rows(
        cls,
        settings: LayerSettings,
        positions: Tensor,
        scores: Tensor | None,
        *,
        start: int,
        seen: int,
        compressions: int,
    ) -> Track:
        """For rows at these positions ``[B, H, rows]``, which compressions (if any) chose, by these carried
        ``scores [B, H, >= start]``."""
        carries = compressions and settings.carries_scores
        chosen = positions[:, :, settings.sink_size : start if carries else None] if compressions else None
        carried = scores[:, :, settings.sink_size : start] if scores is not None and carries else None
        return cls.restored(settings, seen, positions.shape[2], start, compressions, chosen, carried)

    @classmethod
    def restored(
        cls,
        settings: LayerSettings,
        seen: int,
        rows: int,
        start: int,
        compressions: int,
        chosen: Tensor | None,
        scores: Tensor | None = None,
    ) -> Track:
        """With these values of the attributes of the same names."""
        track = cls(settings)
        track.seen, track.rows, track.start, track.compressions = seen, rows, start, compressions
        track.chosen, track._chosen_count = chosen, 0 if chosen is None else chosen.shape[2]
        track.scores = scores
        return track

    @property
    def recent(self) -> int:
        """Rows at the end that are the last tokens seen, all of them."""
        return self.rows - self.settings.sink_size - self._chosen_count if self.compressions else self.rows

    @property
    def settled(self) -> int:
        """Rows before the recent ones: the sink and those that compressions chose."""
        return self.rows - self.recent

    def check_step(self, new: int) -> None:
        """ValueError where ``new`` tokens cannot come at once.

        With a ``boundary``, the token at position ``t`` attends to a cache in which the first ``m`` partitions are
        compressed, ``m = max(0, (n - sink_size) // lag_size - 1)`` for ``n = t // boundary * boundary``. The tokens of
        one step see the same rows, so a step must not reach over a boundary at which a compression comes due.
        """
        if self.seen + new > arguments.MAX_LENGTH:
            raise ValueError(
                f"positions of tokens are int32, so a cache sees at most {arguments.MAX_LENGTH} tokens; it has seen "
                f"{self.seen} and got {new} more: reset() it"
            )
        boundary = self.settings.boundary
        if boundary is None:
            return
        crossed = (self.seen + new - 1) // boundary * boundary
        if crossed > self.seen and self.settings.compressed_count(
            self.rows + crossed - self.seen, self.start
        ):
            raise ValueError(
                f"with boundary={boundary} a step must end at {crossed} tokens, where a compression comes due: {new} "
                f"tokens came after {self.seen}. Give at most {boundary - self.seen % boundary} now, and prompts with "
                f"prefill_chunk_size={boundary}"
            )

    def append(self, new: int) -> None:
        self.seen += new
        self.rows += new

    def remove(self, count: int) -> None:
        """Forget the last ``count`` tokens, which must be `recent` ones."""
        self.seen -= count
        self.rows -= count

    def check_removal(self, count: int, whose: str = "") -> None:
        """ValueError where a compression would have to be undone: the tokens that it chose from are gone."""
        if self.compressions and count > self.recent:
            raise ValueError(
                f"crop would undo a compression{whose}: asked to remove {count} tokens, but only the last "
                f"{self.recent} of the {self.seen} tokens seen are all held (compressions so far: "
                f"{self.compressions}, rows held: {self.rows})"
            )
        if self.compressions and self.seen - count < self._last_boundary():
            raise ValueError(
                f"crop would undo a compression{whose}: asked to remove {count} of {self.seen} tokens, but the cache "
                f"was compressed at {self._last_boundary()} tokens, a multiple of boundary={self.settings.boundary}"
            )

    def _last_boundary(self) -> int:
        """Tokens seen when the last compression ran; 0 without a boundary."""
        boundary, lag_size = self.settings.boundary, self.settings.lag_size
        if boundary is None:
            return 0
        partitions = (self.start - self.settings.sink_size) // self.settings.keep
        least = self.settings.sink_size + (partitions + 1) * lag_size
        return -(-least // boundary) * boundary

    def until_due(self) -> int:
        """Tokens up to the one that sets off the next compression, at least 1."""
        if not self.settings.compresses:
            return arguments.MAX_LENGTH
        missing = max(1, self.start + 2 * self.settings.lag_size - self.rows)
        if self.settings.boundary is None:
            return missing
        return -(-(self.seen + missing) // self.settings.boundary) * self.settings.boundary - self.seen

    def plan(self) -> Plan:
        """The compressions that are due with the rows held."""
        if self.settings.boundary is not None and self.seen % self.settings.boundary:
            return Plan((), self.rows, self.start)
        return plan(self.settings, self.rows, self.start)

    def account(self, planned: Plan) -> None:
        """Set the lengths to those after these compressions. The positions follow, with `record` for every pass."""
        self.rows, self.start = planned.rows, planned.start
        self.compressions += len(planned.passes)
        for done in planned.passes:
            self._chosen_count = self._chosen_after(done, self._chosen_count)

    def carried(self, key: Tensor) -> Tensor:
        """Scores of the chosen rows ``[B, H, n]``, float32, or float64 for such keys."""
        dtype = formulas.arithmetic_dtype(key.dtype)
        return (
            key.new_empty((*key.shape[:2], 0), dtype=dtype) if self.scores is None else self.scores.to(dtype)
        )

    def record(self, index: Tensor, done: Pass, scores: Tensor | None) -> None:
        """Store the positions of the rows that ``done`` left, from the operator's ``index [B, H, >= rows left]``, and
        the ``scores`` of those that it chose, where they are carried."""
        sink = self.settings.sink_size
        before = 0 if self.chosen is None else self.chosen.shape[2]
        rows = index[:, :, sink : sink + self._chosen_after(done, before)]
        positions = rows + (self.seen - done.rows)
        if self.chosen is not None:
            earlier = self.chosen.gather(2, (rows - sink).clamp(max=before - 1).long())
            positions = torch.where(rows < sink + before, earlier, positions)
        self.chosen = positions
        if scores is not None:
            self.scores = scores.clone(memory_format=torch.contiguous_format)

    def _chosen_after(self, done: Pass, before: int) -> int:
        """Chosen rows after a compression of ``before``: up to where it chose, or beyond where it started again and
        its last partition, which stays whole, has some of them."""
        dropped = done.count * (self.settings.lag_size - self.settings.keep)
        chosen = done.start - self.settings.sink_size + done.count * self.settings.keep - done.shed
        return max(chosen, before - dropped)

    def positions(self, batch: int, heads: int, device: torch.device) -> Tensor:
        """int32 ``[batch, heads, rows]``: the position of every row, ascending."""

        def span(begin: int, end: int) -> Tensor:
            positions = torch.arange(begin, end, dtype=torch.int32, device=device)
            return positions.expand(batch, heads, end - begin)

        if self.chosen is None:
            return span(0, self.rows).contiguous()
        return torch.cat(
            [span(0, self.settings.sink_size), self.chosen, span(self.seen - self.recent, self.seen)], 2
        )

    def copy(self) -> Track:
        """The same numbers and, not copied, the same positions: nothing writes into those."""
        return copy.copy(self)

    def split(self, batch: int) -> list[Track]:
        """One track for each of ``batch`` sequences that were compressed together."""
        tracks = [self.copy() for _ in range(batch)]
        for b, track in enumerate(tracks):
            track.map(lambda x, b=b: x[b : b + 1])  # type: ignore[misc]
        return tracks

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.chosen is not None:
            self.chosen = change(self.chosen)
        if self.scores is not None:
            # As integers: what converts keys and values must not round scores.
            bits = self.scores.view(torch.int32 if self.scores.dtype == torch.float32 else torch.int64)
            self.scores = change(bits).view(self.scores.dtype)

    def tensors(self) -> list[Tensor]:
        """Safe in another thread while steps run."""
        return [x for x in (self.chosen, self.scores) if x is not None]
