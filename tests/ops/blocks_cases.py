"""Cases of `compress_blocks`: pools in many layouts, sequences of unequal numbers of partitions, tables full of holes.

Whatever a call does not use is a canary (a NaN of its own): read, it spoils a result, and written it is seen.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import CANARY, DIMS, DTYPES, GUARD, KINDS, Placed, bits, make_values, methods

MAX_ELEMENTS = 1 << 14


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """Memory layout of a pool ``[blocks, rows, heads, channels]``, or one that is split."""

    order: tuple[int, ...] = (0, 1, 2)  #: memory order of the dimensions behind the blocks, slowest first
    pad: int = 0  #: unused elements after every run of the fastest dimension
    spare: int = 0  #: unused elements after every block
    offset: int = 0  #: elements before the first one
    split: tuple[int, int] | None = (
        None  #: rows and channels of a tile: ``[blocks, rows / r, r, heads, D / c, c]``
    )

    @property
    def is_plain(self) -> bool:
        """Every backend takes it."""
        return self.split is None and self.order[-1] == 2


NHD, HND = PoolLayout(), PoolLayout(order=(1, 0, 2))
VEC = PoolLayout(order=(1, 2, 0))  # keys of vLLM's CPU attention
AMX_KEYS = PoolLayout(order=(2, 0, 3, 1, 4), split=(4, 2))  # tiles of 4 rows (16 in vLLM) and 2 channels
AMX_VALUES = PoolLayout(order=(2, 3, 0, 4, 1), split=(2, 4))


def place_pool(x: Tensor, layout: PoolLayout, device: torch.device | str = "cpu") -> Placed:
    """``x [blocks, rows, heads, channels]`` in the given layout, with canaries around it and between its rows."""
    blocks, rows, heads, dim = x.shape
    sizes = (rows, heads, dim)
    if layout.split is not None:
        r, c = layout.split
        sizes = (rows // r, r, heads, dim // c, c)
    strides = [0] * len(sizes)
    step = 1
    for i in reversed(layout.order):
        strides[i] = step
        step = step * sizes[i] + (layout.pad if step == 1 else 0)
    step += layout.spare
    first = GUARD + layout.offset
    storage = torch.empty(first + blocks * step + GUARD, dtype=x.dtype, device=device)
    bits(storage).fill_(CANARY[x.dtype])
    view = storage.as_strided((blocks, *sizes), (step, *strides), first)
    if x.numel():
        bits(view).copy_(bits(x).reshape(view.shape))
    return Placed(storage, view)


def view_like(placed: Placed, storage: Tensor) -> Tensor:
    """The view of ``placed`` in another storage like its own."""
    return storage.as_strided(placed.view.shape, placed.view.stride(), placed.view.storage_offset())


@dataclasses.dataclass(frozen=True)
class BlocksCase:
    """One call of `compress_blocks`."""

    sequences: tuple[tuple[int, int], ...] = ()  #: (m_before, m_after) of each
    heads: int = 1
    key_dim: int = 1
    value_dim: int = 1
    sink: int = 0
    lag_size: int = 1
    keep: int = 1
    block_size: int = 1
    dtype: torch.dtype = torch.float32
    key_kind: str = "normal"
    value_kind: str = "normal"
    key_layout: PoolLayout = NHD
    value_layout: PoolLayout = NHD
    score: str = "std"
    value_weight: float = 1.0
    smooth: int = 1
    spare: int = 0  #: blocks of the pool, and entries of the tables, that nobody uses
    shared: bool = False  #: all sequences are steps of one, with one source table
    seed: int = 0

    @property
    def scoring(self) -> dict:
        return {"value_weight": self.value_weight, "score": self.score, "smooth": self.smooth}

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.sink, self.lag_size, self.keep

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def part(self) -> int:
        return self.sink % self.block_size

    @property
    def plain(self) -> BlocksCase:
        """The same in layouts that every backend takes."""
        layouts = {name: NHD for name in ("key_layout", "value_layout") if not getattr(self, name).is_plain}
        return dataclasses.replace(self, **layouts)

    def partitions(self, b: int) -> int:
        before, after = self.sequences[b]
        return after - before

    def first(self, b: int) -> int:
        return self.sink + self.sequences[b][0] * self.lag_size

    def window(self, b: int) -> int:
        return self.sink + self.sequences[b][1] * self.lag_size

    def kept(self, b: int) -> int:
        return self.partitions(b) * self.keep

    def mixed(self, b: int) -> list[int]:
        """Tokens of the mixed block."""
        if self.part == 0 or self.partitions(b) == 0:
            return []
        behind = range(self.window(b), self.window(b) + self.block_size - self.part)
        return [*range(self.sink - self.part, self.sink), *behind]

    def used(self, b: int) -> list[int]:
        """Tokens that a call may read."""
        if self.partitions(b) == 0:
            return []
        own = range(self.first(b), self.window(b) + self.lag_size)
        return sorted({*own, *self.mixed(b)})

    @property
    def tokens(self) -> int:
        return max((self.window(b) + self.lag_size for b in range(self.batch)), default=0)

    def make(self, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Key and value ``[1, H, tokens, D]`` of every sequence."""
        pairs = []
        sides = (self.key_kind, self.key_dim), (self.value_kind, self.value_dim)
        for b in range(1 if self.shared and self.batch else self.batch):
            pairs.append(
                tuple(
                    make_values(
                        kind, (1, self.heads, self.tokens, dim), self.dtype, 97 * self.seed + 2 * b + side
                    ).to(device)
                    for side, (kind, dim) in enumerate(sides)
                )
            )
        return pairs * self.batch if self.shared else pairs

    def numbers(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """m_before, m_after."""
        before, after = zip(*self.sequences, strict=True) if self.sequences else ((), ())
        return tuple(torch.tensor(m, dtype=torch.int32, device=device) for m in (before, after))

    def pools(
        self, pairs: list[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
    ) -> tuple[Placed, Placed, Tensor, Tensor]:
        """Pools with canaries in every row that a call must not read, and the tables of source and target."""
        generator = torch.Generator().manual_seed(self.seed)
        # Wherever a call does not look, a table may hold anything.
        entries = math.ceil(self.tokens / self.block_size) + self.spare
        targets = max((self.kept(b) + len(self.mixed(b)) for b in range(self.batch)), default=0)
        widths = entries, targets // self.block_size + self.spare
        source, target = (
            torch.randint(-(2**31), 2**31, (self.batch, width + 2), generator=generator).int()[:, 1:-1]
            for width in widths
        )
        used = [sorted({t // self.block_size for t in self.used(b)}) for b in range(self.batch)]
        streams = [sorted(set().union(*used))] if self.shared else used
        written = [(self.kept(b) + len(self.mixed(b))) // self.block_size for b in range(self.batch)]
        blocks = sum(map(len, streams)) + sum(written) + self.spare
        free = torch.randperm(blocks, generator=generator).tolist()
        if self.seed % 3 == 0:
            free.sort(reverse=True)  # blocks that follow each other in the pool
        for b, stream in enumerate(streams):
            for i in stream:
                block = free.pop()
                for row in range(self.batch) if self.shared else (b,):
                    source[row, i] = block
        for b, count in enumerate(written):
            for i in range(count):
                target[b, i] = free.pop()
        placed = []
        for side, (dim, layout) in enumerate(
            ((self.key_dim, self.key_layout), (self.value_dim, self.value_layout))
        ):
            x = torch.empty(blocks, self.block_size, self.heads, dim, dtype=self.dtype)
            bits(x).fill_(CANARY[self.dtype])
            for b in range(self.batch):
                token = torch.tensor(self.used(b), dtype=torch.long)
                block = source[b, token // self.block_size].long()
                bits(x)[block, token % self.block_size] = bits(pairs[b][side].cpu())[0, :, token].transpose(
                    0, 1
                )
            placed.append(place_pool(x, layout, device))
        return placed[0], placed[1], on(device, source), on(device, target)


def on(device: torch.device | str, table: Tensor) -> Tensor:
    """A table on a device, in a wider one as here."""
    wide = torch.zeros(table.shape[0], table.shape[1] + 2, dtype=table.dtype, device=device)
    wide[:, 1:-1] = table.to(device)
    return wide[:, 1:-1]


@st.composite
def pool_layouts(draw: st.DrawFn, block_size: int, dim: int) -> PoolLayout:
    """Half of the time one that every backend takes."""
    padding = {
        "pad": draw(st.integers(0, 9)),
        "spare": draw(st.integers(0, 9)),
        "offset": draw(st.integers(0, 3)),
    }
    kind = draw(st.sampled_from(["engine", "plain", "strided", "split"]))
    if kind == "engine":
        return draw(st.sampled_from([NHD, HND, PoolLayout(order=(1, 0, 2), pad=8), VEC]))
    if kind == "plain":
        return PoolLayout(order=draw(st.sampled_from([(0, 1, 2), (1, 0, 2)])), **padding)
    if kind == "strided":
        return PoolLayout(order=tuple(draw(st.permutations((0, 1, 2)))), **padding)
    divisors = ([n for n in range(1, size + 1) if size % n == 0] or [1] for size in (block_size, dim))
    split = tuple(draw(st.sampled_from(of)) for of in divisors)
    return PoolLayout(order=tuple(draw(st.permutations(range(5)))), split=split, **padding)


@st.composite
def blocks_cases(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    options: bool = False,
) -> BlocksCase:
    """Up to four sequences, also such that compress nothing; ``options``: as for `cases`."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    lag = draw(st.integers(1, 9 if block_size < 8 else 4))
    heads = draw(st.sampled_from([1, 2, 0, 3]))
    sequences = []
    for _ in range(draw(st.integers(0, 4))):
        before = draw(st.integers(0, 3))
        sequences.append((before, before + draw(st.sampled_from([1, 2, 0, 4]))))
    tokens = sum(2 + m for _, m in sequences) * lag * block_size
    dims = st.sampled_from([d for d in DIMS if d <= max(MAX_ELEMENTS // max(1, heads * tokens), 2)])
    key_dim = draw(dims)
    value_dim = draw(st.one_of(st.just(key_dim), dims))
    method = draw(methods(options))
    method.pop("budget", None)
    return BlocksCase(
        sequences=tuple(sequences),
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        sink=draw(st.integers(0, 3 * block_size)),
        lag_size=lag * block_size,
        keep=draw(st.integers(1, lag)) * block_size,
        block_size=block_size,
        dtype=draw(st.sampled_from(dtypes)),
        key_kind=draw(st.sampled_from(kinds)),
        value_kind=draw(st.sampled_from(kinds)),
        key_layout=draw(pool_layouts(block_size, key_dim)),
        value_layout=draw(pool_layouts(block_size, value_dim)),
        **method,
        value_weight=draw(st.sampled_from([1.0, 0.0, 0.5, -1.0])),
        spare=draw(st.integers(0, 3)),
        shared=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )
