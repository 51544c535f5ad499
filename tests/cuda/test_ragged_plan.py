"""The launches of the ragged CUDA kernels: the host knows capacities alone, and results do not depend on the plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests import simt
from tests.cuda.test_plan import A100, DEVICES, H100, METHODS
from tests.ops.backends import Unavailable, make_simt
from tests.ops.cases import bits
from tests.ops.ragged_cases import HND, RaggedCase
from tests.ops.ragged_properties import CHECKS


@pytest.fixture(scope="module")
def executor():
    try:
        return make_simt()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def planner(executor):
    return simt.module()


@given(
    size=st.sampled_from([2, 4, 8]),
    dims=st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
    batch=st.integers(0, 3000),
    heads=st.integers(0, 128),
    capacity=st.integers(0, 1 << 20),
    lag_size=st.one_of(st.integers(1, 5000), st.just(65536)),
    packed=st.booleans(),
    limits=st.sampled_from([H100, A100, {"multiprocessors": 1}]),
    limit=st.sampled_from([48 << 10, 100 << 10]),
    scores_wanted=st.booleans(),
    blend=st.booleans(),
)
def test_plans_keep_to_the_limits(
    planner, size, dims, batch, heads, capacity, lag_size, packed, limits, limit, scores_wanted, blend
):
    dims = (0, 0) if min(dims) == 0 else dims
    rows = capacity if packed else batch * capacity
    device = planner.Device(shared_per_block=limit, **limits)
    made = planner.plan_ragged(
        *(size, *dims, batch, heads, rows, lag_size, 1),
        **{"packed": packed, "scores_wanted": scores_wanted, "blend": blend, "device": device},
    )
    assert made["shared_bytes"] + 2048 <= limit
    assert made["shared_bytes"] % 16 == made["rows"] % 16 == 0
    assert 1 <= made["blocks"] <= made["concurrent"]
    # Fewer blocks than the device holds only where there cannot be as many jobs.
    jobs = heads * (rows // lag_size + rows // made["tile"] + batch)
    assert made["blocks"] >= min(jobs, made["concurrent"])
    # Scratch: statistics of a partition (wide rows: and norms; a blend: of both scores), bounds (and anchors) of its
    # channels, where its rows lie.
    real, statistics, references = 8 if size == 8 else 4, 5 if blend else 3, 8 if blend else 6
    most = real * (statistics * (lag_size + 4) + references * (max(dims) + 8)) + 8 * lag_size + 32
    assert made["scratch_bytes"] <= made["blocks"] * most


@pytest.mark.parametrize("lag_size", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("size", [2, 4])
def test_usual_lag_sizes_need_no_scratch(planner, size, dim, lag_size):
    made = planner.plan_ragged(size, dim, dim, 64, 8, 64 * 8192, lag_size, lag_size // 4)
    assert made["scratch_bytes"] == 0


def test_short_caches_have_small_grids(planner):
    """A decode step whose sequences lose nothing starts as many blocks as there could be jobs, not a whole device."""
    made = planner.plan_ragged(2, 128, 128, 1, 8, 1024, 128, 32, device=planner.Device(**H100))
    assert made["blocks"] == 8 * (8 + 1 + 1)


BASE = RaggedCase(
    ((3, 3 + 5 * 24), (0, 0), (16, 7), (5, 5 + 2 * 24), (2, 2 + 9 * 24 + 7)),
    heads=2, key_dim=64, value_dim=64, lag_size=24, keep=7, dtype=torch.float16, key_kind="offset",
    spare=2, block_size=16,
)  # fmt: skip
CASES = {
    "vectors": BASE,
    "elements": dataclasses.replace(BASE, key_dim=7, value_dim=5, dtype=torch.bfloat16, block_size=5),
    "wide": dataclasses.replace(BASE, key_dim=300, value_dim=257, heads=1, dtype=torch.float32),
    "many-scores": dataclasses.replace(
        BASE, sequences=((2, 2 + 2 * 300), (0, 900)), heads=1, key_dim=8, value_dim=8, lag_size=300, keep=77,
        key_kind="ties", value_kind="ties",
    ),
    "float64": dataclasses.replace(BASE, key_dim=32, value_dim=16, dtype=torch.float64, key_layout=HND),
    "nan": dataclasses.replace(BASE, key_kind="nan", dtype=torch.float32, key_dim=16, value_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_the_plan(executor, name, device, method):
    from tests.simt import operators

    case = dataclasses.replace(CASES[name], **METHODS[method])
    usual = [call(operators, form, case) for form in FORMS]
    with operators.settings(device=DEVICES[device], order="random", seed=5):
        for check in CHECKS:
            check(executor, case)
        odd = [call(operators, form, case) for form in FORMS]
    for one, other in zip(usual, odd, strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y)


FORMS = ("slots", "packed", "pages")


def call(operators, form: str, case: RaggedCase) -> tuple[Tensor, ...]:
    """Everything a call leaves behind, as integers."""
    start, length = case.numbers()
    args = (case.lag_size, case.keep)
    if form == "packed":
        key, value = case.packed(case.make())
        outputs = operators.compress_varlen(
            key.view[:, 0], value.view[:, 0], case.cu_seqlens(), start, *args, **case.method
        )
        rows = int(outputs[3][-1])  # the rest is unspecified
        return bits(outputs[0][:rows]), bits(outputs[1][:rows]), *outputs[2:]
    if form == "slots":
        key, value = case.slots(case.make())
        index = operators.compress_ragged_(key.view, value.view, start, length, *args, **case.method)
    else:
        key, value, table = case.pages(case.make())
        index = operators.compress_paged_(key.view, value.view, table, start, length, *args, **case.method)
    return bits(key.storage), bits(value.storage), start, length, index


def test_forms_agree_bit_for_bit(executor):
    """One method, three address maps: the index of a sequence is the same in each."""
    from tests.simt import operators

    case = dataclasses.replace(BASE, key_kind="normal")
    slots, packed, pages = (call(operators, form, case) for form in FORMS)
    ends = packed[3].tolist()
    for b in range(case.batch):
        count = case.new_length(b)
        assert torch.equal(slots[4][b, :, :count], pages[4][b, :, :count])
        assert torch.equal(slots[4][b, :, :count], packed[2][:, ends[b] : ends[b + 1]])


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_more_sequences_than_threads(executor, check):
    """The schedule goes through sequences 256 at a time, and so does the search for a job's sequence."""
    lengths = [
        (b % 3, (b * 7) % 5 + (2 * 4 + 3 if b in (0, 255, 256, 257, 511, 512, 599) else 0))
        for b in range(600)
    ]
    check(
        executor,
        RaggedCase(tuple(lengths), key_dim=4, value_dim=4, lag_size=4, keep=1, block_size=4, spare=1),
    )


def test_launches_depend_on_capacities_alone(executor):
    """A captured graph needs the same launches for other starts and lengths."""
    from tests.simt import operators

    pool = torch.randn(70, 16, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    table = torch.arange(70, dtype=torch.int32).view(5, 14)
    seen = []
    for starts, lengths in (
        ([3, 0, 16, 5, 2], [123, 0, 7, 53, 224]),
        ([0] * 5, [0] * 5),
        ([1, 2, 3, 4, 5], [200, 100, 9, 80, 224]),
    ):
        start, length = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
        operators.compress_paged_(pool.clone(), pool.clone(), table, start, length, 24, 7)
        keys = ("kernel", "grid", "block", "dynamic_shared_bytes")
        seen.append([tuple(launch[k] for k in keys) for launch in operators.last().launches()])
    assert seen[0] == seen[1] == seen[2]


# Values that cannot be: nothing outside is touched (the executor sees every access), and other sequences are served.

ANY = st.one_of(st.integers(-3, 60), st.sampled_from([-(2**31), 2**31 - 1, 2**30]))


@given(starts=st.lists(ANY, min_size=3, max_size=3), lengths=st.lists(ANY, min_size=3, max_size=3))
def test_any_start_and_length(executor, starts, lengths):
    capacity, lag_size, keep = 50, 8, 3
    case = RaggedCase(((0, capacity),) * 3, heads=2, key_dim=8, value_dim=4, lag_size=lag_size, keep=keep)
    key, value = case.slots(case.make())
    before = [p.storage.clone() for p in (key, value)]
    views = [p.view.clone() for p in (key, value)]
    start, length = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
    index = executor.compress_ragged_(key.view, value.view, start, length, lag_size, keep)
    for p, old in zip((key, value), before, strict=True):
        assert torch.equal(bits(p.storage[p.outside()]), bits(old[p.outside()]))
    for b, (first, tokens) in enumerate(zip(starts, lengths, strict=True)):
        valid = first >= 0 and 0 <= tokens <= capacity
        lost = max(0, (tokens - first) // lag_size - 1) if valid else 0
        assert start[b] == first + lost * keep
        assert length[b] == tokens - lost * (lag_size - keep)
        new = int(length[b]) if valid else 0
        assert (index[b, :, new:] == -1).all()
        for p, old in zip((key, value), views, strict=True):
            rows = index[b, :, :new].long().unsqueeze(-1).expand(-1, -1, old.shape[3])
            assert torch.equal(p.view[b, :, :new], old[b].gather(1, rows))
            if not lost:
                assert torch.equal(p.view[b], old[b])


@given(
    first=st.sampled_from([0, 0, 0, 1, -1, 60]),
    offsets=st.lists(ANY, min_size=3, max_size=3),
    starts=st.lists(ANY, min_size=3, max_size=3),
)
@example(first=3, offsets=[20, 40, 60], starts=[0, 0, 0])
@example(first=0, offsets=[20, 40, 60], starts=[0, -3, 0])
def test_any_cu_seqlens(executor, first, offsets, starts):
    rows = 60
    x = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(0))
    cu_seqlens, start = (torch.tensor(n, dtype=torch.int32) for n in ([first, *offsets], starts))
    new_key, _, index, new_cu_seqlens, new_start = executor.compress_varlen(x, x + 1, cu_seqlens, start, 8, 3)
    ends = cu_seqlens.tolist()
    if first != 0 or sorted(ends) != ends or ends[-1] > rows:
        assert not new_cu_seqlens.any()
        assert (index == -1).all()
        assert torch.equal(new_start, start)
        return
    position = 0
    for b in range(3):
        tokens = ends[b + 1] - ends[b]
        lost = max(0, (tokens - starts[b]) // 8 - 1) if starts[b] >= 0 else 0
        count = tokens - lost * 5
        assert new_cu_seqlens[b + 1] == position + count
        assert new_start[b] == starts[b] + lost * 3
        kept = index[0, position : position + count].long()
        assert torch.equal(new_key[position : position + count, 0], x[ends[b] + kept, 0])
        position += count
    assert (index[:, position:] == -1).all()


@given(blocks=st.lists(st.one_of(st.integers(0, 11), ANY), min_size=12, max_size=12, unique=True))
def test_any_block_table(executor, blocks):
    """Two sequences of 6 pages of 4 rows; pages of no two sequences are the same."""
    pool = torch.randn(12, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    key, value = pool.clone(), pool + 1
    table = torch.tensor(blocks, dtype=torch.int32).view(2, 6)
    start, length = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([24, 17], dtype=torch.int32)
    index = executor.compress_paged_(key, value, table, start, length, 4, 1)
    for b, (first, tokens) in enumerate(((1, 24), (0, 17))):
        used = table[b, : -(-tokens // 4)]
        lost = (tokens - first) // 4 - 1
        if ((used < 0) | (used >= 12)).any():
            assert (start[b], length[b]) == (first, tokens)
            assert (index[b] == -1).all()
            inside = used[(used >= 0) & (used < 12)].long()
            assert torch.equal(key[inside], pool[inside])
            continue
        assert (start[b], length[b]) == (first + lost, tokens - 3 * lost)
        rows = pool[used.long()].flatten(0, 1)  # [rows, H, D]
        mine = key[used.long()].flatten(0, 1)
        for head in range(2):
            kept = index[b, head, : length[b]].long()
            assert torch.equal(mine[: length[b], head], rows[kept, head])


def test_pages_of_no_rows(executor):
    key = torch.empty(3, 0, 2, 8)
    table, start, length = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [0], [0]))
    assert executor.compress_paged_(key, key.clone(), table, start, length, 4, 1).shape == (1, 2, 0)
    assert (start, length) == (0, 0)


def test_pages_that_two_sequences_have_twice(executor):
    """Allowed as long as neither moves a row in them, as with a prefix that both have."""
    pool = torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    key, value = pool.clone(), pool + 1
    table = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    start, length = torch.tensor([0, 0], dtype=torch.int32), torch.tensor([5, 5], dtype=torch.int32)
    index = executor.compress_paged_(key, value, table, start, length, 4, 1)
    assert torch.equal(key, pool)
    assert torch.equal(index[:, :, :5], torch.arange(5, dtype=torch.int32).expand(2, 2, 5))
