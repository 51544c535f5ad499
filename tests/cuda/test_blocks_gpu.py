"""Properties of `compress_blocks` that only a card shows: graphs that follow its numbers, and no wait.

The property itself runs on the card as backend ``cuda`` (test_blocks_properties.py). Marked ``gpu``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lagkv_ext import reference
from tests.ops.blocks_cases import HND, BlocksCase
from tests.ops.cases import bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CASE = BlocksCase(
    ((0, 6), (0, 6), (0, 6)), heads=4, key_dim=128, value_dim=128, sink=20, lag_size=128, keep=32, block_size=16,
    dtype=torch.bfloat16, key_layout=HND, value_layout=HND,
)  # fmt: skip
# (m_before, m_after) of every sequence, for one replay after another.
NUMBERS = (
    ((0, 0), (0, 0), (0, 0)),
    ((0, 2), (1, 3), (2, 2)),
    ((0, 6), (5, 6), (0, 1)),
    ((2, 4), (0, 0), (1, 6)),
)


def call(state: tuple) -> torch.Tensor:
    return torch.ops.lagkv.compress_blocks(*state, *CASE.sizes)


def test_a_captured_graph_follows_the_numbers() -> None:
    key, value, source, target = CASE.pools(CASE.make("cuda"), "cuda")
    before, after = CASE.numbers("cuda")
    state = key.view, value.view, source, target, before, after
    pristine = [x.storage.clone() for x in (key, value)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(state)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index = call(state)
    for numbers in NUMBERS:
        for x, m in zip((before, after), zip(*numbers, strict=True), strict=True):
            x.copy_(torch.tensor(m))
        for x, old in zip((key, value), pristine, strict=True):
            x.storage.copy_(old)
        graph.replay()
        written = [x.storage.clone() for x in (key, value)]
        for x, old in zip((key, value), pristine, strict=True):
            x.storage.copy_(old)
        assert torch.equal(call(state), index)
        for x, mine in zip((key, value), written, strict=True):
            assert torch.equal(bits(x.storage), bits(mine))


def test_rows_are_those_of_the_reference() -> None:
    """At the size of a model, in float64: scores have no near-ties."""
    case = dataclasses.replace(CASE, dtype=torch.float64, heads=2)
    states = []
    for device in ("cuda", "cpu"):
        key, value, source, target = case.pools(case.make(device), device)
        states.append((key.view, value.view, source, target, *case.numbers(device)))
    index = call(states[0])
    assert torch.equal(index.cpu(), reference.compress_blocks(*states[1], *case.sizes))
    for mine, its in zip(states[0][:2], states[1][:2], strict=True):
        assert torch.equal(bits(mine.cpu()), bits(its))


def test_never_waits_for_the_device() -> None:
    key, value, source, target = CASE.pools(CASE.make("cuda"), "cuda")
    state = key.view, value.view, source, target, *CASE.numbers("cuda")
    call(state)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(state)
    finally:
        torch.cuda.set_sync_debug_mode(before)
