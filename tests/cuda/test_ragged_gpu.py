"""Properties of the ragged operators that only a card shows: graphs that follow lengths, no wait, sizes.

The properties themselves run on the card as backend ``cuda`` (test_ragged_properties.py). Marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lagkv_ext  # noqa: F401  (loads the operators)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OPS = torch.ops.lagkv
LAG_SIZE, KEEP = 128, 32
BATCH, HEADS, CAPACITY, DIM, BLOCK_SIZE = 5, 4, 2048, 128, 16
FORMS = ("slots", "packed", "pages")
# (start, length) of every sequence, for one replay after another: more, fewer and no partitions to compress.
NUMBERS = (
    ((16, 2048), (0, 0), (16, 271), (16, 272), (700, 1800)),
    ((0, 300), (16, 2000), (2048, 2048), (5, 1400), (16, 900)),
    ((16, 100), (16, 200), (0, 255), (1, 2), (2000, 2048)),
    ((16, 2048),) * 5,
)


class Call:
    """One form of the operators on static tensors, as a server has them."""

    def __init__(self, form: str) -> None:
        self.form = form
        options = {"device": "cuda", "dtype": torch.bfloat16}
        if form == "pages":
            shape: tuple[int, ...] = (BATCH * CAPACITY // BLOCK_SIZE, BLOCK_SIZE, HEADS, DIM)
        elif form == "packed":
            shape = (BATCH * CAPACITY, HEADS, DIM)
        else:
            shape = (BATCH, HEADS, CAPACITY, DIM)
        self.key, self.value = torch.zeros(shape, **options), torch.zeros(shape, **options)
        self.start, self.length = (torch.zeros(BATCH, dtype=torch.int32, device="cuda") for _ in range(2))
        self.cu_seqlens = torch.zeros(BATCH + 1, dtype=torch.int32, device="cuda")
        self.table = torch.zeros(BATCH, CAPACITY // BLOCK_SIZE, dtype=torch.int32, device="cuda")

    def fill(self, numbers: tuple[tuple[int, int], ...], seed: int) -> None:
        torch.manual_seed(seed)
        self.key.normal_()
        self.value.normal_()
        starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in zip(*numbers, strict=True))
        self.start.copy_(starts)
        self.length.copy_(lengths)
        self.cu_seqlens[1:].copy_(lengths.cumsum(0))
        self.table.copy_(torch.randperm(self.table.numel()).int().view(self.table.shape))

    def rows(self, x: Tensor, b: int, length: int) -> Tensor:
        """``[1, H, length, D]`` of a sequence, by the numbers as they were filled in."""
        if self.form == "slots":
            return x[b : b + 1, :, :length]
        if self.form == "packed":
            first = int(self.cu_seqlens[b])
            return x[first : first + length].transpose(0, 1)[None]
        return x[self.table[b].long()].flatten(0, 1)[:length].transpose(0, 1)[None]

    def expected(self) -> list[tuple[Tensor, ...]]:
        numbers = zip(self.start.tolist(), self.length.tolist(), strict=True)
        return [
            OPS.compress(
                self.rows(self.key, b, length), self.rows(self.value, b, length), start, LAG_SIZE, KEEP
            )
            for b, (start, length) in enumerate(numbers)
        ]

    def __call__(self) -> tuple[Tensor, ...]:
        if self.form == "slots":
            return (OPS.compress_ragged_(self.key, self.value, self.start, self.length, LAG_SIZE, KEEP),)
        if self.form == "packed":
            return OPS.compress_varlen(self.key, self.value, self.cu_seqlens, self.start, LAG_SIZE, KEEP)
        return (
            OPS.compress_paged_(self.key, self.value, self.table, self.start, self.length, LAG_SIZE, KEEP),
        )

    def check(self, outputs: tuple[Tensor, ...], expected: list[tuple[Tensor, ...]]) -> None:
        position = 0
        for b, (key, value, index) in enumerate(expected):
            count = index.shape[2]
            if self.form == "packed":
                assert outputs[3].tolist()[b : b + 2] == [position, position + count]
                new = [x[position : position + count].transpose(0, 1)[None] for x in outputs[:2]]
                kept = outputs[2][None, :, position : position + count]
                position += count
            else:
                assert int(self.length[b]) == count
                new = [self.rows(x, b, count) for x in (self.key, self.value)]
                kept = outputs[0][b : b + 1, :, :count]
                assert (outputs[0][b, :, count:] == -1).all()
            assert torch.equal(kept, index)
            assert torch.equal(new[0], key)
            assert torch.equal(new[1], value)


def warmed_up(step: Callable[[], object]) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_graph_follows_the_lengths(form: str) -> None:
    call = Call(form)
    call.fill(NUMBERS[2], seed=0)
    warmed_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for seed, numbers in enumerate(NUMBERS):
        call.fill(numbers, seed)
        expected = call.expected()
        graph.replay()
        call.check(outputs, expected)


@pytest.mark.parametrize("form", FORMS)
def test_replays_compress_as_tokens_come(form: str) -> None:
    """Decode in a graph: in place, start and length are the next replay's."""
    if form == "packed":
        pytest.skip("packed rows are not in place")
    call = Call(form)
    call.fill(NUMBERS[3], seed=3)
    warmed_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    call.fill(NUMBERS[3], seed=3)
    for _ in range(3):
        expected = call.expected()
        graph.replay()
        call.check(outputs, expected)
        call.length.add_(300)


@pytest.mark.parametrize("form", FORMS)
def test_never_waits_for_the_device(form: str) -> None:
    call = Call(form)
    call.fill(NUMBERS[0], seed=1)
    call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_pool_of_more_than_two_to_the_31_elements() -> None:
    """Pages at the end of a huge pool."""
    blocks = 2**31 // (BLOCK_SIZE * HEADS * DIM) + 2 * CAPACITY // BLOCK_SIZE
    needed = 2 * blocks * BLOCK_SIZE * HEADS * DIM * 2
    free = torch.cuda.mem_get_info()[0]
    if free < needed * 1.1:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")
    call = Call("pages")
    call.key = torch.empty(blocks, BLOCK_SIZE, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    call.value = torch.empty_like(call.key)
    assert call.key.numel() > 2**31
    call.fill(NUMBERS[0], seed=2)
    last = blocks - 1 - torch.arange(BATCH * CAPACITY // BLOCK_SIZE, device="cuda", dtype=torch.int32)
    call.table.copy_(last.view(call.table.shape))
    expected = call.expected()
    call.check(call(), expected)
