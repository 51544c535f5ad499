"""Arguments that are written must not share memory: the exact answer, against sets of addresses.

csrc/overlap.h is asked directly for arrays of any strides, and through the operators for tensors. Layouts that
interleave without overlapping must pass.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lagkv_ext
from tests.ops import test_ragged_errors as ragged

ROOT = Path(lagkv_ext.__file__).resolve().parent.parent
NO_WORK, ALL_WORK = 0, 2**40


@dataclass(frozen=True)
class Array:
    """Strides and sizes in elements, as tensors have them."""

    address: int
    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def runs(self) -> list[int]:
        """The address of every element."""
        indices = itertools.product(*map(range, self.sizes))
        return [
            self.address + self.element * sum(map(math.prod, zip(i, self.strides, strict=True)))
            for i in indices
        ]

    def bytes(self) -> set[int]:
        return {run + i for run in self.runs() for i in range(self.element)}

    def overlaps_itself(self) -> bool:
        return len(self.bytes()) < math.prod(self.sizes) * self.element

    def arguments(self) -> list:
        vector = ctypes.c_int64 * max(1, len(self.sizes))
        return [self.address, self.element, len(self.sizes), vector(*self.sizes), vector(*self.strides)]


@st.composite
def arrays(draw) -> Array:
    dims = draw(st.integers(0, 4))
    sizes = draw(st.lists(st.integers(0, 5) | st.just(1), min_size=dims, max_size=dims))
    # Nested layouts, near misses of them, and anything.
    steps = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 18, 20, 24, 30, 60])
    strides = draw(st.lists(steps | st.integers(0, 80), min_size=dims, max_size=dims))
    return Array(draw(st.integers(0, 300)), draw(st.sampled_from([1, 2, 4, 8])), tuple(sizes), tuple(strides))


@st.composite
def flat_arrays(draw) -> Array:
    """Few dimensions, longer ones."""
    dims = draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(1, 40), min_size=dims, max_size=dims))
    strides = draw(st.lists(st.integers(1, 500), min_size=dims, max_size=dims))
    return Array(draw(st.integers(0, 3000)), draw(st.sampled_from([1, 2, 4])), tuple(sizes), tuple(strides))


@st.composite
def fused(draw) -> tuple[Array, Array]:
    """Two slices of one nested buffer, possibly with their dimensions in another order: what callers really have."""
    dims = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
    pads = draw(st.lists(st.integers(0, 2), min_size=dims, max_size=dims))
    strides, stride = [], 1
    for size, pad in zip(reversed(sizes), reversed(pads), strict=True):
        strides.insert(0, stride)
        stride *= size + pad
    element = draw(st.sampled_from([2, 4]))
    sides = []
    for _ in range(2):
        first = [draw(st.integers(0, size)) for size in sizes]
        own = [draw(st.integers(0, size + 1 - at)) for size, at in zip(sizes, first, strict=True)]
        order = draw(st.permutations(range(dims)))
        offset = sum(map(math.prod, zip(first, strides, strict=True)))
        sides.append(
            Array(element * offset, element, tuple(own[d] for d in order), tuple(strides[d] for d in order))
        )
    return sides[0], sides[1]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: c++ was not found")
    path = tmp_path_factory.mktemp("overlap") / "overlap.so"
    source = ROOT / "tests/ops/cpp/overlap.cpp"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
    subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    one = [
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_int64),
        ctypes.POINTER(ctypes.c_int64),
    ]
    loaded.overlap.argtypes = [*one, *one, ctypes.c_int64]
    loaded.overlaps_itself.argtypes = [*one, ctypes.c_int64]
    loaded.reaches.argtypes = [ctypes.c_int64, *[ctypes.POINTER(ctypes.c_int64)] * 2, *[ctypes.c_int64] * 2]
    return loaded


def overlap(library: ctypes.CDLL, a: Array, b: Array, work: int) -> bool:
    return bool(library.overlap(*a.arguments(), *b.arguments(), work))


@settings(max_examples=300)
@given(pair=st.tuples(arrays(), arrays()) | fused() | st.tuples(flat_arrays(), flat_arrays()))
def test_two_arrays(library, pair):
    a, b = pair
    shared = bool(a.bytes() & b.bytes())
    for work in (NO_WORK, 5, ALL_WORK):
        assert overlap(library, a, b, work) == shared
        assert overlap(library, b, a, work) == shared


@settings(max_examples=300)
@given(x=arrays() | fused().map(lambda pair: pair[0]) | flat_arrays())
@example(x=Array(0, 4, (2, 2), (3, 4)))  # 0 3 4 7: neither dimension holds the other, and nothing is shared
@example(x=Array(0, 4, (3, 2), (3, 4)))  # 0 3 6 4 7 10
@example(x=Array(0, 4, (5, 4), (3, 4)))  # 12 is there twice
@example(x=Array(0, 4, (0, 4), (0, 0)))
def test_one_array(library, x):
    for work in (NO_WORK, 5, ALL_WORK):
        assert bool(library.overlaps_itself(*x.arguments(), work)) == x.overlaps_itself()


def term(step: st.SearchStrategy[int], most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(step, st.integers(1, most))


@settings(max_examples=400)
@given(
    # Any; two that are sparse, with a dense one; sparse ones with a common divisor.
    terms=st.lists(term(st.integers(1, 60), 9), max_size=3)
    | st.tuples(*[term(st.integers(20, 120), 30)] * 2, term(st.integers(1, 3), 9))
    | st.tuples(*[term(st.integers(2, 40), 25)] * 2)
    | st.lists(term(st.integers(1, 30).map(lambda n: 6 * n), 9), max_size=3)
)
def test_bounded_sums(library, terms):
    """Every target at once: the search against the set of all sums."""
    steps, mosts = ([pair[i] for pair in terms] for i in (0, 1))
    sums = {
        sum(map(math.prod, zip(x, steps, strict=True)))
        for x in itertools.product(*(range(n + 1) for n in mosts))
    }
    vector = ctypes.c_int64 * max(1, len(terms))
    for target in range(-1, max(sums) + 2):
        found = library.reaches(len(terms), vector(*steps), vector(*mosts), target, ALL_WORK)
        assert bool(found) == (target in sums), target


LARGE = 2**31 - 1
SLOTS = ((64, 8, LARGE, 128), (8 * LARGE * 256, LARGE * 256, 256, 1))  # half of a last dimension of 256
PAGES = ((LARGE, 16, 8, 128), (32768, 1024, 128, 1))  # half of [blocks, 2, 16, 8, 128]


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (Array(0, 2, *SLOTS), Array(256, 2, *SLOTS), False),
        (Array(0, 2, *SLOTS), Array(254, 2, *SLOTS), True),
        (Array(0, 2, *SLOTS), Array(2 * 8 * LARGE * 256 + 256, 2, *SLOTS), False),
        (Array(0, 2, *SLOTS), Array(2 * 8 * LARGE * 256 + 258, 2, *SLOTS), True),
        (Array(2**50, 2, *PAGES), Array(2**50 + 32768, 2, *PAGES), False),
        (Array(2**50, 2, *PAGES), Array(2**50 + 32768 - 65536 * 2**30, 2, *PAGES), False),
        (Array(2**50, 2, *PAGES), Array(2**50 + 32766, 2, *PAGES), True),
        (Array(2**50, 2, *PAGES), Array(2**50, 4, (LARGE,), (1,)), True),
        # Every other page, and the heads of those between in another order.
        (Array(0, 2, *PAGES), Array(32768, 2, (LARGE, 8, 16, 128), (65536, 128, 1024, 1)), False),
        # As far apart as 7 and 11 rows, which meet at 77.
        (Array(0, 2, (LARGE, 64), (7 * 128, 1)), Array(128, 2, (LARGE, 64), (11 * 128, 1)), False),
        (Array(0, 2, (LARGE, 64), (7 * 128, 1)), Array(3 * 256, 2, (LARGE, 64), (11 * 128, 1)), True),
    ],
)
def test_large_arrays(library, a, b, shared):
    """Real layouts at sizes of which no list could be made: the search alone answers."""
    assert overlap(library, a, b, 100) == shared
    assert overlap(library, b, a, 100) == shared


# --- through the operators

OPERATORS = torch.ops.lagkv


def memory(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


LAYOUTS = {
    "[B, H, N, 2 D]": lambda: memory(2, 3, 20, 8).split(4, -1),
    "[B, H, N, 2 D] with a gap": lambda: (x := memory(2, 3, 20, 9), (x[..., :4], x[..., 5:]))[1],
    "[B, N, 2, H, D]": lambda: memory(2, 20, 2, 3, 4).transpose(1, 3).unbind(2),
    "[B, N, 2 H, D]": lambda: memory(2, 20, 6, 4).transpose(1, 2).split(3, 1),
    "[B, N, H, 2, D]": lambda: memory(2, 20, 3, 2, 4).transpose(1, 2).unbind(3),
    "[2, B, H, N, D]": lambda: memory(2, 2, 3, 20, 4).unbind(0),
    "rows in turns": lambda: (x := memory(2, 3, 40, 4), (x[:, :, ::2], x[:, :, 1::2]))[1],
    "batches in turns": lambda: (x := memory(4, 3, 20, 4), (x[::2], x[1::2]))[1],
    "halves of the rows": lambda: memory(2, 3, 40, 4).split(20, 2),
    "one row": lambda: memory(2, 3, 1, 8).expand(2, 3, 1, 8).split(4, -1),
    "no rows": lambda: (x := memory(2, 3, 0, 4), (x, x))[1],
    "no channels": lambda: (x := memory(2, 3, 20, 0), (x, x))[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_interleave_are_compressed(layout):
    key, value = LAYOUTS[layout]()
    expected = OPERATORS.compress(key, value, 2, 4, 2)
    index = OPERATORS.compress_(key, value, 2, 4, 2)
    assert torch.equal(index, expected[2])
    for x, new in zip((key, value), expected[:2], strict=True):
        assert torch.equal(x[:, :, : new.shape[2]], new)


@settings(max_examples=200)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7)),
    dims=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(*[st.tuples(*[st.integers(0, 24)] * 3)] * 2),
    offsets=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_compress_refuses_exactly_what_overlaps(sizes, dims, strides, offsets):
    storage = memory(400)
    tensors, memories = [], []
    for dim, stride, offset in zip(dims, strides, offsets, strict=True):
        tensors.append(storage.as_strided((*sizes, dim), (*stride, 1), offset))
        memories.append(Array(offset, 1, (*sizes, dim), (*stride, 1)))
    names = [name for name, x in zip(("key", "value"), memories, strict=True) if x.overlaps_itself()]
    before = storage.clone()
    if names or memories[0].bytes() & memories[1].bytes():
        with pytest.raises(RuntimeError) as caught:
            OPERATORS.compress_(*tensors, 0, 2, 1)
        text = str(caught.value)
        wanted = f"{names[0]} must not overlap itself" if names else "value must not overlap key"
        assert text.startswith(f"lagkv::compress_: {wanted}, got ")
        assert torch.equal(storage, before)
        return
    expected = OPERATORS.compress(*tensors, 0, 2, 1)
    OPERATORS.compress_(*tensors, 0, 2, 1)
    for x, new in zip(tensors, expected[:2], strict=True):
        assert torch.equal(x[:, :, : new.shape[2]], new)


def ragged_arguments(op: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in ragged.right(op).items() if isinstance(x, torch.Tensor)}


WRITTEN = {
    "compress_ragged_": ("key", "value", "start", "length"),
    "compress_paged_": ("key_cache", "value_cache", "start", "length"),
}
PAIRS = [
    (op, first, second)
    for op, written in WRITTEN.items()
    for first, second in itertools.combinations(
        [x for x in ragged.ARGUMENTS[op] if x not in ("lag_size", "keep")], 2
    )
    if first in written or second in written
]


@pytest.mark.parametrize(("op", "first", "second"), PAIRS)
@pytest.mark.parametrize("shared", [1, 0])
def test_every_pair_that_is_written_is_checked(op, first, second, shared):
    """Both in one storage: with their last and first bytes over each other, or side by side."""
    arguments = ragged_arguments(op)
    one, other = arguments[first], arguments[second]
    element = max(one.element_size(), other.element_size())
    storage = torch.zeros(one.nbytes + other.nbytes + element, dtype=torch.uint8)
    ends = one.nbytes - shared * element
    for name, x, at in ((first, one, 0), (second, other, ends)):
        arguments[name] = storage[at : at + x.nbytes].view(x.dtype).view(x.shape)
        arguments[name].copy_(x)
    if shared:
        before = storage.clone()
        with pytest.raises(RuntimeError, match=rf"lagkv::{op}: {second} must not overlap {first}, got "):
            getattr(OPERATORS, op)(*arguments.values(), 4, 2)
        assert torch.equal(storage, before)
    else:
        getattr(OPERATORS, op)(*arguments.values(), 4, 2)


def test_pages_over_each_other_are_refused():
    arguments = ragged_arguments("compress_paged_")
    blocks, block_size, heads, dim = arguments["key_cache"].shape
    storage = memory(blocks * block_size * heads * dim)
    stride = (block_size - 1) * heads * dim  # the last row of a page is the first of the next
    arguments["key_cache"] = storage.as_strided(
        (blocks, block_size, heads, dim), (stride, heads * dim, dim, 1)
    )
    with pytest.raises(RuntimeError, match=r"key_cache must not overlap itself, got shape .* strides"):
        OPERATORS.compress_paged_(*arguments.values(), 4, 2)


@pytest.mark.parametrize(
    "layout",
    {
        "vLLM [2, blocks, block_size, H, D]": lambda: memory(2, 9, 4, 3, 4).unbind(0),
        "FlashInfer NHD [blocks, 2, block_size, H, D]": lambda: memory(9, 2, 4, 3, 4).unbind(1),
        "FlashInfer HND [blocks, 2, H, block_size, D]": lambda: (
            memory(9, 2, 3, 4, 4).transpose(2, 3).unbind(1)
        ),
        "[blocks, H, block_size, 2 D]": lambda: memory(9, 3, 4, 8).transpose(1, 2).split(4, -1),
    }.items(),
    ids=lambda layout: layout[0],
)
def test_pools_of_engines_are_compressed(layout):
    arguments = ragged_arguments("compress_paged_")
    arguments["key_cache"], arguments["value_cache"] = layout[1]()
    OPERATORS.compress_paged_(*arguments.values(), 4, 2)
    assert arguments["length"].tolist() == [14, 9]


def test_what_is_only_read_may_overlap():
    """compress writes outputs of its own, and a block table may be one row for all sequences."""
    x = memory(1, 1, 24, 6)
    OPERATORS.compress(x[..., :4], x[..., 2:], 2, 4, 2)
    arguments = ragged_arguments("compress_paged_")
    arguments["block_table"] = torch.tensor([8, 0, 7, 2, 5], dtype=torch.int32).expand(2, 5)
    arguments["length"].zero_()
    OPERATORS.compress_paged_(*arguments.values(), 4, 2)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("shift", [0, 2])
def test_refused_when_compiled(compiler, shift):
    """Functionalisation keeps views of one buffer views of one buffer."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return OPERATORS.compress_(x[..., :4], x[..., shift : shift + 4], 2, 4, 2)

    torch._dynamo.reset()
    buffer = memory(1, 2, 24, 6)
    before = buffer.clone()
    with pytest.raises(RuntimeError, match="value must not overlap key"):
        torch.compile(step, fullgraph=True, backend=compiler)(buffer)
    assert torch.equal(buffer, before)
