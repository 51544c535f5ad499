"""The one launch of `compress_blocks` on CUDA: the room in the tables decides it, and no result depends on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda.test_plan import DEVICES
from tests.cuda.test_ragged_traffic import rows_read
from tests.cuda.test_traffic import RUNS, reads, writes
from tests.ops.backends import Unavailable, make_simt
from tests.ops.blocks_cases import HND, BlocksCase
from tests.ops.blocks_properties import check_blocks
from tests.ops.cases import bits
from tests.ops.ragged_cases import RaggedCase


@pytest.fixture(scope="module")
def executor():
    try:
        return make_simt()
    except Unavailable as reason:
        pytest.skip(str(reason))


BASE = BlocksCase(
    ((0, 5), (3, 3), (1, 3), (7, 8)),
    heads=2, key_dim=64, value_dim=64, sink=20, lag_size=24, keep=8, block_size=8, dtype=torch.float16,
    key_kind="offset", spare=2, seed=1,
)  # fmt: skip
CASES = {
    "vectors": BASE,
    "elements": dataclasses.replace(BASE, key_dim=7, value_dim=5, dtype=torch.bfloat16, block_size=4),
    "wide": dataclasses.replace(BASE, key_dim=300, value_dim=257, heads=1, dtype=torch.float32),
    "many-scores": dataclasses.replace(
        BASE, sequences=((0, 1), (1, 1), (0, 2)), heads=1, key_dim=8, value_dim=8, lag_size=304, keep=80,
        key_kind="ties", value_kind="ties",
    ),
    "float64": dataclasses.replace(BASE, key_dim=32, value_dim=16, dtype=torch.float64, key_layout=HND),
    "whole-blocks": dataclasses.replace(BASE, sink=16, dtype=torch.float32),
    "nan": dataclasses.replace(BASE, key_kind="nan", dtype=torch.float32, key_dim=16, value_dim=16),
}  # fmt: skip


def call(operators, case: BlocksCase) -> tuple[Tensor, ...]:
    """Everything a call leaves behind, as integers."""
    key, value, source, target = case.pools(case.make())
    index = operators.compress_blocks(
        key.view, value.view, source, target, *case.numbers(), *case.sizes, **case.scoring
    )
    return bits(key.storage), bits(value.storage), index


METHODS = {
    "std": {"score": "std"},
    "cosine": {"score": "cosine"},
    "blend": {"score": "blend"},
    "smoothed": {"score": "blend", "smooth": 5},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_the_plan(executor, name, device, method):
    from tests.simt import operators

    case = dataclasses.replace(CASES[name], **METHODS[method])
    usual = call(operators, case)
    with operators.settings(device=DEVICES[device], order="random", seed=5):
        check_blocks(executor, case)
        odd = call(operators, case)
    for one, other in zip(usual, odd, strict=True):
        assert torch.equal(one, other)


def test_one_launch_that_depends_on_the_room_alone(executor):
    """A captured graph needs the same launch for other numbers."""
    from tests.simt import operators

    case = dataclasses.replace(BASE, sequences=((0, 5), (0, 5)))
    key, value, source, target = case.pools(case.make())
    seen = []
    for before, after in (([0, 0], [5, 5]), ([2, 2], [2, 2]), ([1, 0], [3, 0]), ([0, 4], [1, 3])):
        numbers = (torch.tensor(m, dtype=torch.int32) for m in (before, after))
        operators.compress_blocks(key.view, value.view, source, target, *numbers, *case.sizes)
        (launch,) = operators.last().launches()
        seen.append(tuple(launch[k] for k in ("kernel", "grid", "block", "dynamic_shared_bytes")))
    assert len(set(seen)) == 1


# Invalid numbers and tables: nothing outside is touched (the executor sees every access); other sequences are served.

ANY = st.one_of(st.integers(-2, 6), st.sampled_from([-(2**31), 2**31 - 1, 2**30]))


@given(
    m_before=st.lists(ANY, min_size=3, max_size=3),
    m_after=st.lists(ANY, min_size=3, max_size=3),
    sink=st.sampled_from([0, 3, 4, 40, 2**31 - 1]),
)
@example(m_before=[-1, 2, 0], m_after=[1, 1, 3], sink=3)
@example(m_before=[0, 1, 2], m_after=[3, 5, 4], sink=4)
@example(m_before=[0, 3, 0], m_after=[4, 5, 2], sink=3)
def test_any_numbers(executor, m_before, m_after, sink):
    case = BlocksCase(
        ((0, 4),) * 3, heads=2, key_dim=8, value_dim=4, sink=3, lag_size=8, keep=4, block_size=4
    )
    key, value, source, target = case.pools(case.make())
    target = target[:, :4].contiguous()  # room for 4 blocks: 3 partitions and a mixed block
    before = [bits(x).clone() for x in (key.storage, value.storage)]
    views = [x.view.clone() for x in (key, value)]
    numbers = (torch.tensor(m, dtype=torch.int32) for m in (m_before, m_after))
    index = executor.compress_blocks(key.view, value.view, source, target, *numbers, sink, 8, 4)
    tokens, part = source.shape[1] * 4, sink % 4
    written = []
    for b, (low, high) in enumerate(zip(m_before, m_after, strict=True)):
        count = high - low
        rows = count * 4 + (4 if part else 0)
        valid = low >= 0 and count > 0 and sink + (high + 1) * 8 <= tokens and rows <= 16
        assert bool((index[b] >= 0).any()) is valid
        assert int((index[b, 0] >= 0).sum()) == (rows if valid else 0)
        if valid:
            written += target[b, : rows // 4].tolist()
    for x, old, view in zip((key, value), before, views, strict=True):
        assert torch.equal(bits(x.storage)[x.outside()], old[x.outside()])
        unwritten = [block for block in range(view.shape[0]) if block not in written]
        assert torch.equal(bits(x.view[unwritten]), bits(view[unwritten]))


@pytest.mark.parametrize("block", [-1, -(2**31), 10_000, 2**31 - 1])
@pytest.mark.parametrize("entry", ["first", "behind", "sink", "target", "mixed"])
def test_a_block_outside_the_pool_leaves_its_sequence_alone(executor, entry, block):
    case = BlocksCase(
        ((1, 2), (1, 2)), heads=2, key_dim=8, value_dim=4, sink=3, lag_size=8, keep=4, block_size=4
    )
    key, value, source, target = case.pools(case.make())
    table, column = {
        "first": (source, 2),  # token 11
        "behind": (source, 6),  # token 26, the last of the partition behind
        "sink": (source, 0),
        "target": (target, 0),
        "mixed": (target, 1),
    }[entry]
    own = target[0].tolist()
    table[0, column] = block
    old = [x.view.clone() for x in (key, value)]
    index = executor.compress_blocks(key.view, value.view, source, target, *case.numbers(), *case.sizes)
    assert (index[0] == -1).all()
    assert (index[1] >= 0).all()
    for x, before in zip((key, value), old, strict=True):
        assert torch.equal(bits(x.view[own]), bits(before[own]))


# Traffic, as test_ragged_traffic.py counts it: blocks of vLLM, a sink of whole blocks and one that ends inside a block.

LLAMA = BlocksCase(
    ((0, 6), (2, 2), (3, 5)), heads=2, key_dim=128, value_dim=128, sink=16, lag_size=128, keep=32, block_size=16,
    dtype=torch.bfloat16, key_layout=HND, value_layout=HND, seed=1,
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sink", [16, 20])
@pytest.mark.parametrize("device", RUNS)
def test_traffic(executor, device, sink, method):
    """A blend asks for its rows twice, the second time from L2."""
    from tests.simt import operators

    case = dataclasses.replace(LLAMA, sink=sink, **METHODS[method])
    key, value, source, target = case.pools(case.make())
    with operators.settings(device=RUNS[device]):
        index = operators.compress_blocks(
            key.view, value.view, source, target, *case.numbers(), *case.sizes, **case.scoring
        )
    (launch,) = operators.last().launches()
    row = (case.key_dim + case.value_dim) * 2 * case.heads
    partitions = sum(case.partitions(b) for b in range(case.batch))
    runs = partitions if device == "short runs" else sum(case.partitions(b) > 0 for b in range(case.batch))
    mixed = sum(len(case.mixed(b)) for b in range(case.batch))
    kept = partitions * case.keep
    scored = (partitions + runs) * case.lag_size * (2 if case.score == "blend" else 1)
    rows = (scored + kept + mixed) * row
    assert rows_read(launch, RaggedCase()) == rows, (
        "each partition once, one more a run, kept rows again, mixed rows"
    )
    assert reads(launch) - rows <= 0.1 * rows, "numbers: the tables, where rows lie, what is kept"
    assert writes(launch) == (kept + mixed) * row + index.nbytes, "each byte once"
    for site in launch["sites"]:
        if site["access"] == "global_read" and site["size"] == 16:
            assert site["sector_efficiency"] >= 0.95
