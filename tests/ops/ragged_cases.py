"""Cases of the ragged operators: sequences of unequal starts and lengths, in slots, packed rows and pages.

Whatever is not a token in use is a canary (a NaN of its own): read, it spoils a result, and written it is seen.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import CANARY, DIMS, DTYPES, KINDS, Layout, Placed, bits, make_values, methods, place

MAX_ELEMENTS = 1 << 14
NHD, HND = Layout(), Layout(order=(0, 2, 1))  # memory orders of pages


@dataclasses.dataclass(frozen=True)
class RaggedCase:
    """One call of a ragged operator, in any of the three forms."""

    sequences: tuple[tuple[int, int], ...] = ()  #: (start, length) of each
    heads: int = 1
    key_dim: int = 1
    value_dim: int = 1
    lag_size: int = 1
    keep: int = 1
    dtype: torch.dtype = torch.float32
    key_kind: str = "normal"
    value_kind: str = "normal"
    key_layout: Layout = NHD
    value_layout: Layout = NHD
    score: str = "std"
    value_weight: float = 1.0
    smooth: int = 1
    budget: str = "partition"
    spare: int = 0  #: rows, or pages, that no sequence has
    block_size: int = 1
    shared: bool = False  #: pages before every start are the same for all sequences
    seed: int = 0

    @property
    def scoring(self) -> dict:
        smooth = {} if self.smooth == 1 else {"smooth": self.smooth}
        return {"value_weight": self.value_weight, "score": self.score} | smooth

    @property
    def method(self) -> dict:
        return self.scoring | ({} if self.budget == "partition" else {"budget": self.budget})

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def most(self) -> int:
        return max((length for _, length in self.sequences), default=0)

    def compressed(self, b: int) -> int:
        """Partitions that lose tokens; written out here, as the formulas are under test."""
        start, length = self.sequences[b]
        return max(0, (length - start) // self.lag_size - 1)

    def new_length(self, b: int) -> int:
        return self.sequences[b][1] - self.compressed(b) * (self.lag_size - self.keep)

    def new_start(self, b: int) -> int:
        return self.sequences[b][0] + self.compressed(b) * self.keep

    @property
    def shared_blocks(self) -> int:
        """Whole pages that lie before the start of every sequence, none of which ends before."""
        if not self.shared or not self.sequences:
            return 0
        return min(min(pair) for pair in self.sequences) // self.block_size

    def make(self, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Key and value ``[1, H, N, D]`` of every sequence."""
        result = []
        for b, (_, length) in enumerate(self.sequences):
            pair = []
            for side, (kind, dim) in enumerate(
                ((self.key_kind, self.key_dim), (self.value_kind, self.value_dim))
            ):
                shape = (1, self.heads, length, dim)
                x = make_values(kind, shape, self.dtype, 97 * self.seed + 2 * b + side)
                same = self.shared_blocks * self.block_size
                if b > 0 and same:
                    bits(x)[:, :, :same] = bits(result[0][side].cpu())[:, :, :same]
                pair.append(x.to(device))
            result.append((pair[0], pair[1]))
        return result

    def numbers(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """start, length."""
        starts, lengths = zip(*self.sequences, strict=True) if self.sequences else ((), ())
        return (
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
        )

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        lengths = [length for _, length in self.sequences]
        ends = [sum(lengths[:b]) for b in range(self.batch + 1)]
        return torch.tensor(ends, dtype=torch.int32, device=device)

    def slots(
        self, pairs: list[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
    ) -> tuple[Placed, Placed]:
        """``[B, H, capacity, D]`` with canaries past every length."""
        placed = []
        for side, (dim, layout) in enumerate(self._sides()):
            x = self._canaries(self.batch, self.heads, self.most + self.spare, dim)
            for b, (_, length) in enumerate(self.sequences):
                bits(x)[b, :, :length] = bits(pairs[b][side].cpu())[0]
            placed.append(place(x, layout, device))
        return placed[0], placed[1]

    def packed(
        self, pairs: list[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
    ) -> tuple[Placed, Placed]:
        """``[T, 1, H, D]`` with canaries after the last sequence; ``view[:, 0]`` is what the operator takes."""
        rows = sum(length for _, length in self.sequences)
        placed = []
        for side, (dim, layout) in enumerate(self._sides()):
            x = self._canaries(rows + self.spare, 1, self.heads, dim)
            first = 0
            for b, (_, length) in enumerate(self.sequences):
                bits(x)[first : first + length, 0] = bits(pairs[b][side].cpu())[0].transpose(0, 1)
                first += length
            placed.append(place(x, layout, device))
        return placed[0], placed[1]

    def pages(
        self, pairs: list[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
    ) -> tuple[Placed, Placed, Tensor]:
        """Pools ``[blocks, block_size, H, D]`` with canaries in every row not in use, and the block table."""
        generator = torch.Generator().manual_seed(self.seed)
        counts = [math.ceil(length / self.block_size) for _, length in self.sequences]
        blocks = sum(counts) + self.spare
        free = torch.randperm(blocks, generator=generator).tolist()
        if self.seed % 3 == 0:
            free.sort()  # pages that follow each other in the pool
        # Past a sequence's pages the table may hold anything.
        wide = torch.randint(-(2**31), 2**31, (self.batch, max(counts, default=0) + 3), generator=generator)
        table = wide.int()[:, 1 : max(counts, default=0) + 2]
        for b, count in enumerate(counts):
            shared = table[0, : self.shared_blocks].tolist() if b else []
            own = [free.pop() for _ in range(count - len(shared))][:: 1 if self.seed % 3 else -1]
            table[b, :count] = torch.tensor(shared + own, dtype=torch.int32)
        placed = []
        for side, (dim, layout) in enumerate(self._sides()):
            x = self._canaries(blocks, self.block_size, self.heads, dim)
            for b, (_, length) in enumerate(self.sequences):
                block, row = self.place_of(table[b], length)
                bits(x)[block, row] = bits(pairs[b][side].cpu())[0].transpose(0, 1)
            placed.append(place(x, layout, device))
        wide = wide.int().to(device)
        wide[:, 1 : table.shape[1] + 1] = table.to(device)
        return placed[0], placed[1], wide[:, 1 : table.shape[1] + 1]

    def place_of(self, blocks: Tensor, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Block and row in it of the tokens first .. length - 1 of a sequence."""
        position = torch.arange(first, length, device=blocks.device)
        return blocks[position // self.block_size].long(), position % self.block_size

    def _sides(self) -> tuple[tuple[int, Layout], ...]:
        return ((self.key_dim, self.key_layout), (self.value_dim, self.value_layout))

    def _canaries(self, *shape: int) -> Tensor:
        x = torch.empty(shape, dtype=self.dtype)
        bits(x).fill_(CANARY[self.dtype])
        return x


@st.composite
def ragged_layouts(draw: st.DrawFn) -> Layout:
    """Half of the time one that engines have, or a part of a larger pool."""
    if draw(st.booleans()):
        return draw(st.sampled_from([NHD, HND, Layout(spare=(0, 0, 4)), Layout(order=(0, 2, 1), row_pad=8)]))
    return Layout(
        order=tuple(draw(st.permutations((0, 1, 2)))),
        row_pad=draw(st.integers(0, 9)),
        spare=tuple(draw(st.tuples(*[st.integers(0, 2)] * 3))),
        offset=draw(st.integers(0, 3)),
    )


@st.composite
def ragged_cases(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    compresses: bool = False,
    options: bool = False,
) -> RaggedCase:
    """Up to five sequences; ``compresses``: one at least has two partitions; ``options``: as for `cases`."""
    heads = draw(st.sampled_from([1, 2, 3] if compresses else [1, 2, 0, 3]))
    lag_size = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 32, 33, 64])))
    batch = draw(st.integers(1, 5) if compresses else st.integers(0, 5))
    sequences = []
    for b in range(batch):
        start = draw(st.integers(0, 12))
        partitions = draw(st.integers(2, 6) if compresses and b == 0 else st.sampled_from([3, 2, 0, 1, 5]))
        length = start + partitions * lag_size + draw(st.integers(0, lag_size - 1))
        if partitions == 0:  # also sequences that end before their start, and empty ones
            length = draw(st.one_of(st.just(0), st.integers(0, length)))
        sequences.append((start, length))
    budget = MAX_ELEMENTS // max(1, heads * sum(length for _, length in sequences))
    dims = st.sampled_from([d for d in DIMS if d <= max(budget, 2)])
    key_dim = draw(dims)
    return RaggedCase(
        sequences=tuple(draw(st.permutations(sequences))),
        heads=heads,
        key_dim=key_dim,
        value_dim=draw(st.one_of(st.just(key_dim), dims)),
        lag_size=lag_size,
        keep=draw(st.one_of(st.integers(1, lag_size), st.just(max(1, lag_size // 4)))),
        dtype=draw(st.sampled_from(dtypes)),
        key_kind=draw(st.sampled_from(kinds)),
        value_kind=draw(st.sampled_from(kinds)),
        key_layout=draw(ragged_layouts()),
        value_layout=draw(ragged_layouts()),
        value_weight=draw(st.sampled_from([1.0, 0.0, 0.5, -1.0])),
        **draw(methods(options)),
        spare=draw(st.integers(0, 4)),
        block_size=draw(st.one_of(st.integers(1, 5), st.sampled_from([8, 16, 32]))),
        shared=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )
