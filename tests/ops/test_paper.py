"""The authors' algorithm, written here from the paper, keeps exactly the tokens that ``compress`` keeps.

Random float64 caches whose scores are at least 1e-9 apart where the cut is made; recursion included: prefill in chunks,
then decode token by token.
"""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

GAP = 1e-9


class TooClose(Exception):
    """Two scores at the cut are nearer than GAP: the paper's answer depends on rounding."""


def authors_partition(key: Tensor, value: Tensor, next_key: Tensor, next_value: Tensor, keep: int) -> Tensor:
    """Kept rows of one partition ``[L, D]`` of one head, in the order of their scores, as the authors leave them."""
    score = torch.zeros(len(key), dtype=torch.float64)
    for x, reference in ((key, next_key), (value, next_value)):
        low, high = reference.min(dim=0).values, reference.max(dim=0).values
        score += ((x - low) / (high - low)).std(dim=-1).softmax(dim=-1)
    values, order = score.topk(len(score))
    if keep < len(score) and values[keep - 1] - values[keep] < GAP:
        raise TooClose
    return order[:keep]


class AuthorsHead:
    """The cache of one head; ``positions`` says which tokens its rows are."""

    def __init__(self, dim: int, value_dim: int, sink: int, lag_size: int, keep: int) -> None:
        self.key, self.value = torch.empty(0, dim).double(), torch.empty(0, value_dim).double()
        self.positions: list[int] = []
        self.seen, self.prefix, self.lag_size, self.keep = 0, sink, lag_size, keep

    def append(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = torch.cat([self.key, key]), torch.cat([self.value, value])
        self.positions += range(self.seen, self.seen + len(key))
        self.seen += len(key)
        size = self.lag_size
        rows = list(range(min(self.prefix, len(self.positions))))
        first = self.prefix
        while first + 2 * size <= len(self.positions):
            here, after = slice(first, first + size), slice(first + size, first + 2 * size)
            kept = authors_partition(
                self.key[here], self.value[here], self.key[after], self.value[after], self.keep
            )
            rows += (first + kept).tolist()
            first += size
        if first == self.prefix:
            return
        self.prefix = len(rows)
        rows += range(first, len(self.positions))
        self.key, self.value = self.key[rows], self.value[rows]
        self.positions = [self.positions[row] for row in rows]


class OurCache:
    """All heads, by the operator."""

    def __init__(self, backend, sink: int, lag_size: int, keep: int) -> None:
        self.backend, self.start, self.lag_size, self.keep = backend, sink, lag_size, keep
        self.rows: tuple[Tensor, ...] | None = None
        self.seen = self.compressions = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        batch, heads, count, _ = key.shape
        position = torch.arange(self.seen, self.seen + count, device=key.device).expand(batch, heads, count)
        new = (key, value, position)
        self.rows = (
            new
            if self.rows is None
            else tuple(torch.cat(pair, dim=2) for pair in zip(self.rows, new, strict=True))
        )
        self.seen += count
        key, value, position = self.rows
        if key.shape[2] >= self.start + 2 * self.lag_size:
            count = (key.shape[2] - self.start) // self.lag_size
            key, value, index = self.backend.compress(key, value, self.start, self.lag_size, self.keep)
            self.start += self.keep * (count - 1)
            self.rows = key, value, position.gather(2, index.long())
            self.compressions += 1


@given(
    heads=st.integers(1, 3),
    dims=st.tuples(st.sampled_from([2, 3, 8, 33, 64]), st.sampled_from([2, 4, 16, 65])),
    sink=st.integers(0, 6),
    lag_size=st.integers(2, 24),
    keep=st.integers(1, 24),
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    decode=st.integers(0, 40),
    seed=st.integers(0, 1 << 20),
)
def test_the_authors_algorithm_keeps_the_same_tokens(
    backend, heads, dims, sink, lag_size, keep, chunks, decode, seed
):
    keep = min(keep, lag_size)
    generator = torch.Generator().manual_seed(seed)
    theirs = [AuthorsHead(*dims, sink, lag_size, keep) for _ in range(heads)]
    ours = OurCache(backend, sink, lag_size, keep)
    try:
        for count in [*chunks, *[1] * decode]:
            key, value = (
                torch.randn(1, heads, count, dim, generator=generator, dtype=torch.float64) for dim in dims
            )
            for h, head in enumerate(theirs):
                head.append(key[0, h], value[0, h])
            ours.append(key.to(backend.device), value.to(backend.device))
    except TooClose:
        assume(False)
    positions = ours.rows[2][0].tolist()
    for h, head in enumerate(theirs):
        assert positions[h] == sorted(head.positions)
        assert ours.rows[0].shape[2] == len(head.key)
        order = torch.tensor(head.positions).argsort()
        torch.testing.assert_close(ours.rows[0][0, h].cpu(), head.key[order], rtol=0, atol=0)
        torch.testing.assert_close(ours.rows[1][0, h].cpu(), head.value[order], rtol=0, atol=0)


def test_recursion_compresses_in_prefill_and_in_decode(backend):
    """The strategy above is no good if nothing is ever compressed: one long run, counted."""
    ours = OurCache(backend, 4, 8, 2)
    generator = torch.Generator().manual_seed(0)
    theirs = AuthorsHead(16, 16, 4, 8, 2)
    for count in (50, 30, *[1] * 40):
        key, value = (
            torch.randn(1, 1, count, 16, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        theirs.append(key[0, 0], value[0, 0])
        ours.append(key.to(backend.device), value.to(backend.device))
    assert ours.compressions == 7
    assert ours.rows[2][0, 0].tolist() == sorted(theirs.positions)
    assert ours.start == 4 + 2 * ((120 - 4) // 8 - 1)
