"""Cases of the operators: Hypothesis strategies for shapes, memory layouts, dtypes and values."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# A NaN with a payload of its own: reading it spoils a result, and overwriting it is seen.
CANARY = {
    torch.float16: 0x7E5A,
    torch.bfloat16: 0x7FDA,
    torch.float32: 0x7FC5A5A5,
    torch.float64: 0x7FF85A5A5A5A5A5A,
}
GUARD = 64  # canary elements before and after every tensor

FINITE_KINDS = (
    "normal", "offset", "outliers", "ties", "constant", "holes", "zeros", "tiny", "denormal", "mixed_scale", "vast",
    "constant_denormal",
)  # fmt: skip
KINDS = (*FINITE_KINDS, "huge", "nan", "inf", "constant_inf")
DIMS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 100, 128, 192, 256)
MAX_ELEMENTS = 1 << 14


def bits(x: Tensor) -> Tensor:
    """The elements as integers: equal where they are bit for bit the same, NaN included."""
    return x.view(INTEGER[x.dtype]) if x.dtype in INTEGER else x


@dataclasses.dataclass(frozen=True)
class Layout:
    """Memory layout of a ``[B, H, N, D]`` tensor; the last dimension is contiguous."""

    order: tuple[int, ...] = (0, 1, 2)  #: memory order of batch, heads, tokens, slowest first
    row_pad: int = 0  #: unused elements after every row
    spare: tuple[int, ...] = (0, 0, 0)  #: unused entries of batch, heads, tokens: a slice of a larger buffer
    offset: int = 0  #: elements before the first one; 1 takes every row off its 16-byte boundary
    expanded: tuple[int, ...] = ()  #: dimensions of stride 0


class Placed(NamedTuple):
    """A tensor in a larger storage full of canaries."""

    storage: Tensor
    view: Tensor

    def outside(self) -> Tensor:
        """Mask over the storage: the elements that are not the view's."""
        mask = torch.ones(self.storage.shape, dtype=torch.bool, device=self.storage.device)
        mask.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        return mask


def place(x: Tensor, layout: Layout, device: torch.device | str = "cpu") -> Placed:
    """``x`` copied to ``device`` in the given layout, with canaries around it and between its rows."""
    sizes = [1 if dim in layout.expanded else n for dim, n in enumerate(x.shape[:3])]
    strides = [0, 0, 0]
    step = x.shape[3] + layout.row_pad
    for dim in reversed(layout.order):
        strides[dim] = 0 if dim in layout.expanded else step
        step *= sizes[dim] + layout.spare[dim]
    first = GUARD + layout.offset
    storage = torch.empty(first + step + GUARD, dtype=x.dtype, device=device)
    bits(storage).fill_(CANARY[x.dtype])
    view = storage.as_strided(x.shape, (*strides, 1), first)
    if x.numel():
        narrow = view
        for dim in layout.expanded:
            narrow, x = narrow.narrow(dim, 0, 1), x.narrow(dim, 0, 1)
        bits(narrow).copy_(bits(x))
    return Placed(storage, view)


def make_values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random ``[B, H, N, D]`` values of one kind, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    batch, heads, length, dim = shape
    finfo = torch.finfo(dtype)
    x = randn(*shape)
    if (
        kind == "offset"
    ):  # real keys: every channel has its own mean, far from zero and much larger than its spread
        x = x * 0.05 + randn(batch, heads, 1, dim) * 5
    elif kind == "outliers":
        x = x * (1 + 50 * (rand(1, heads, 1, dim) < 0.1)) * (1 + 20 * (rand(batch, heads, length, 1) < 0.1))
    elif kind == "ties":  # few distinct rows: most scores occur several times
        pool = randn(batch, heads, 3, dim).round()
        pick = torch.randint(0, 3, (batch, heads, length, 1), generator=generator)
        x = pool.gather(2, pick.expand(*shape))
    elif kind.startswith("constant"):
        if kind == "constant_denormal":  # 1 / (hi - lo) is infinite beside channels of equal bounds
            x = (x * 40).round() * finfo.smallest_normal * finfo.eps
        x = torch.where(rand(batch, heads, 1, dim) < 0.5, randn(batch, heads, 1, dim), x)
    elif kind == "holes":  # rows of norm zero
        x = x * (rand(batch, heads, length, 1) < 0.7)
    elif kind == "zeros":
        x = torch.zeros(shape, dtype=torch.float64)
    elif kind == "tiny":
        x = x * 1e-6
    elif kind == "denormal":
        # Built from the integer count of smallest steps, as the product itself could round to zero.
        x = (x * 40).round() * finfo.smallest_normal * finfo.eps
    elif kind == "mixed_scale":
        x = x * 10.0 ** torch.randint(-3, 4, (batch, heads, length, 1), generator=generator)
    elif kind == "vast":  # differences are still finite
        x = (rand(*shape) - 0.5) * (0.9 * finfo.max)
    elif kind == "huge":
        x = (x * (finfo.max / 4)).clamp(-finfo.max, finfo.max)
    x = x.to(dtype)
    if kind == "nan":
        payload = torch.randint(1, 1 << 6, shape, generator=generator)
        sign = torch.where(rand(*shape) < 0.5, torch.iinfo(INTEGER[dtype]).min, 0)
        nans = (bits(torch.full(shape, math.nan, dtype=dtype)) | payload | sign).to(INTEGER[dtype])
        chance = 0.5 / max(1, dim * length)
        x = torch.where(rand(*shape) < chance, nans, bits(x)).view(dtype)
    elif kind in ("inf", "constant_inf"):
        infinite = torch.where(rand(*shape) < 0.5, -math.inf, math.inf).to(dtype)
        x = torch.where(rand(*shape) < 0.5 / max(1, dim * length), infinite, x)
    return x


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of ``compress`` and everything its inputs are made of."""

    batch: int = 1
    heads: int = 1
    length: int = 0
    key_dim: int = 1
    value_dim: int = 1
    start: int = 0
    lag_size: int = 1
    keep: int = 1
    dtype: torch.dtype = torch.float32
    key_kind: str = "normal"
    value_kind: str = "normal"
    key_layout: Layout = Layout()
    value_layout: Layout = Layout()
    score: str = "std"
    value_weight: float = 1.0
    smooth: int = 1
    budget: str = "partition"
    seed: int = 0

    @property
    def scoring(self) -> dict:
        """Arguments of lag_score; options only where they are not the defaults, which not every backend has."""
        smooth = {} if self.smooth == 1 else {"smooth": self.smooth}
        return {"value_weight": self.value_weight, "score": self.score} | smooth

    @property
    def method(self) -> dict:
        return self.scoring | ({} if self.budget == "partition" else {"budget": self.budget})

    @property
    def compressed(self) -> int:
        """Partitions that lose tokens; written out here, as the formulas are under test."""
        return max(0, (self.length - self.start) // self.lag_size - 1)

    @property
    def window(self) -> int:
        """Position of the first token that stays for certain after the compressed partitions."""
        return self.start + self.compressed * self.lag_size if self.compressed else 0

    def make(self, device: torch.device | str = "cpu") -> tuple[Placed, Placed]:
        """Key and value, each in a storage of its own."""
        shape = (self.batch, self.heads, self.length)
        key = make_values(self.key_kind, (*shape, self.key_dim), self.dtype, 2 * self.seed)
        value = make_values(self.value_kind, (*shape, self.value_dim), self.dtype, 2 * self.seed + 1)
        return place(key, self.key_layout, device), place(value, self.value_layout, device)


def _traps() -> dict[str, Case]:
    base = Case(
        batch=1, heads=2, length=3 + 5 * 16 + 4, key_dim=32, value_dim=32, start=3, lag_size=16, keep=5
    )
    of = dataclasses.replace
    traps = {"plain": base, "odd": of(base, batch=3, length=47, lag_size=7, keep=2, key_dim=13, value_dim=5)}
    for name in ("huge", "nan", "inf", "constant_inf"):
        traps[name] = of(base, key_kind=name)
    traps["nan-kept"] = of(base, heads=8, keep=16, key_kind="nan", value_kind="nan")
    traps["no-channels"] = of(base, key_dim=0, value_dim=0)
    traps["no-channels-of-value"] = of(base, value_dim=0)
    for kind in (
        "holes",
        "zeros",
        "constant",
        "denormal",
        "constant_denormal",
    ):  # wider than the streaming layouts of the CUDA kernels
        traps[f"wide-{kind}"] = of(base, key_dim=257, value_dim=300, key_kind=kind, value_kind=kind)
    traps["wide-aligned"] = of(base, key_dim=260, value_dim=320, length=3 + 3 * 16)
    traps["wide-one-token"] = of(base, lag_size=1, keep=1, length=5, key_dim=257, value_dim=260)
    traps["one-channel"] = of(base, key_dim=1, value_dim=2)
    traps["one-token"] = of(base, lag_size=1, keep=1, length=9)
    traps["keep-all"] = of(base, keep=16)
    traps["exactly-two"] = of(base, length=3 + 2 * 16)
    traps["almost-two"] = of(base, length=3 + 2 * 16 - 1)
    traps["start-past-the-end"] = of(base, start=100)
    traps["no-tokens"] = of(base, length=0)
    traps["no-heads"] = of(base, heads=0)
    traps["weight-zero"] = of(base, value_weight=0.0)
    traps["weight-negative"] = of(base, value_weight=-2.0)
    odd, models = Layout((1, 2, 0), row_pad=3, spare=(0, 1, 2), offset=1), Layout((0, 2, 1), spare=(0, 2, 0))
    traps["odd-strides"] = of(base, batch=2, key_layout=odd, value_layout=models)
    traps["models-strides"] = of(base, batch=2, key_layout=models, value_layout=odd, dtype=torch.bfloat16)
    for kind in ("offset", "constant", "denormal", "tiny", "holes", *FINITE_KINDS):
        for dtype in DTYPES:
            traps[f"{kind}-{str(dtype)[6:]}"] = of(base, key_kind=kind, value_kind=kind, dtype=dtype)
    both = {}
    for name, case in traps.items():
        both |= {name: case, f"{name}-cosine": of(case, score="cosine")}
    return both


# Cases that wrong kernels are known to trip over; every backend runs all of them, every time.
TRAPS = _traps()


@st.composite
def methods(draw: st.DrawFn, options: bool) -> dict:
    """How tokens are scored and chosen; without ``options`` as every backend can."""
    if not options:
        return {"score": draw(st.sampled_from(["std", "cosine"]))}
    return {
        "score": draw(st.sampled_from(["blend", "std", "cosine"])),
        "smooth": draw(st.sampled_from([3, 1, 5, 33, 99])),
        "budget": draw(st.sampled_from(["head", "partition"])),
    }


@st.composite
def layouts(draw: st.DrawFn, expanded: bool = True) -> Layout:
    if draw(st.booleans()):  # half of the time a layout that models have
        models = [
            Layout(),
            Layout(order=(0, 2, 1)),
            Layout(spare=(0, 0, 7)),
            Layout(order=(0, 2, 1), spare=(0, 3, 0)),
        ]
        return draw(st.sampled_from(models))
    return Layout(
        order=tuple(draw(st.permutations((0, 1, 2)))),
        row_pad=draw(st.integers(0, 9)),
        spare=tuple(draw(st.tuples(*[st.integers(0, 2)] * 3))),
        offset=draw(st.integers(0, 3)),
        expanded=draw(st.sampled_from([(), (), (0,), (1,), (0, 1)])) if expanded else (),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    expanded: bool = True,
    compresses: bool = False,
    options: bool = False,
) -> Case:
    """Calls of every shape up to ``MAX_ELEMENTS`` elements of key; ``compresses``: with two partitions at least;
    ``options``: also with those that only some backends have."""
    batch = draw(st.sampled_from([1, 2, 3] if compresses else [1, 2, 0, 3]))
    heads = draw(st.sampled_from([1, 2, 3, 5] if compresses else [1, 2, 3, 5, 0]))
    lag_size = draw(
        st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 100, 128, 200]))
    )
    start = draw(st.one_of(st.integers(0, 5), st.integers(6, 40)))
    count = draw(st.integers(2, 6) if compresses else st.sampled_from([3, 2, 1, 0, 4, 5, 6]))
    rest = draw(st.integers(0, lag_size - 1))
    length = start + count * lag_size + rest
    if not compresses and count == 0:  # also sequences that end before start
        length = draw(st.integers(0, length))
    budget = MAX_ELEMENTS // max(1, batch * heads * length)
    dims = st.sampled_from([d for d in DIMS if d <= max(budget, 2)])
    key_dim = draw(dims)
    return Case(
        batch=batch,
        heads=heads,
        length=length,
        key_dim=key_dim,
        value_dim=draw(st.one_of(st.just(key_dim), dims)),
        start=start,
        lag_size=lag_size,
        keep=draw(st.one_of(st.integers(1, lag_size), st.just(max(1, lag_size // 4)))),
        dtype=draw(st.sampled_from(dtypes)),
        key_kind=draw(st.sampled_from(kinds)),
        value_kind=draw(st.sampled_from(kinds)),
        key_layout=draw(layouts(expanded)),
        value_layout=draw(layouts(expanded)),
        value_weight=draw(st.sampled_from([1.0, 0.0, 0.5, -1.0, 3.0])),
        **draw(methods(options)),
        seed=draw(st.integers(0, 1 << 16)),
    )
