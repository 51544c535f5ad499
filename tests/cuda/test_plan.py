"""The launch planner of the CUDA kernels (csrc/cuda/plan.h), and the kernels under plans that only odd devices get."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lagkv_ext import formulas, reference
from tests import simt
from tests.ops.backends import Unavailable, make_simt
from tests.ops.cases import DTYPES, Case
from tests.ops.properties import CASE_CHECKS, check_compress, check_lag_score

H100 = {"multiprocessors": 132, "shared_per_multiprocessor": 228 << 10}
A100 = {"multiprocessors": 108, "shared_per_multiprocessor": 164 << 10}


@pytest.fixture(scope="module")
def executor():
    try:
        return make_simt()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def planner(executor):
    return simt.module()


def plan(planner, *args, device=None, **options):
    return planner.plan_compress(*args, device=planner.Device(**(device or H100)), **options)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "dim", [1, 2, 3, 8, 16, 63, 64, 72, 80, 96, 100, 128, 192, 255, 256, 257, 320, 512, 513, 1030, 70000]
)
def test_layout_covers_the_row(planner, size, aligned, dim):
    elements, lanes, chunks = planner.row_shape(size, dim, aligned)
    if elements == 0:
        assert dim > 256, "a wide layout reads rows several times: only for rows that lanes cannot hold"
        return
    assert lanes in (8, 16, 32)
    assert elements * lanes * chunks >= dim
    assert dim % elements == 0
    if elements > 1:
        assert aligned
        assert elements * size == 16, "vectors are of 16 bytes"


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_usual_dims_are_vectors_with_most_lanes_at_work(planner, size, dim):
    elements, lanes, chunks = planner.row_shape(size, dim)
    assert elements * size == 16
    assert dim / (elements * lanes * chunks) >= 0.6


@given(
    heads=st.integers(1, 300),
    partitions=st.integers(1, 3000),
    lag_size=st.sampled_from([1, 16, 128, 1024]),
    share=st.sampled_from([2, 4, 8]),
    device=st.sampled_from([H100, A100, {"multiprocessors": 1, "shared_per_multiprocessor": 100 << 10}]),
)
def test_runs_cover_every_partition_once(planner, heads, partitions, lag_size, share, device):
    keep = max(1, lag_size // share)
    length = 16 + (partitions + 1) * lag_size
    made = plan(planner, 2, 128, 128, heads, length, 16, lag_size, keep, device=device)
    if keep == lag_size:
        assert made["run_blocks"] == 0, "nothing is lost, so nothing is scored"
        return
    assert made["partitions"] == partitions
    assert (made["runs"] - 1) * made["run"] < partitions <= made["runs"] * made["run"]
    assert made["run_blocks"] == heads * made["runs"]
    # The prefix and what follows the compressed partitions, in tiles of copy_rows.
    assert made["copy_blocks"] == heads * math.ceil((16 + lag_size) / planner.copy_rows)
    assert made["blocks"] == made["run_blocks"] + made["copy_blocks"]
    # A run is longer than one partition only where short ones would not fit the machine at once.
    concurrent = 3 * device["multiprocessors"]
    if heads * partitions <= concurrent:
        assert made["run"] == 1


def cost(heads, partitions, run, lag_size, keep, concurrent):
    return math.ceil(heads * math.ceil(partitions / run) / concurrent) * (run * (lag_size + keep) + lag_size)


@given(heads=st.integers(1, 64), partitions=st.integers(1, 400))
def test_run_length_is_near_the_best(planner, heads, partitions):
    made = plan(planner, 2, 128, 128, heads, 16 + (partitions + 1) * 128, 16, 128, 32)
    concurrent = 3 * 132
    best = min(cost(heads, partitions, run, 128, 32, concurrent) for run in range(1, partitions + 1))
    assert cost(heads, partitions, made["run"], 128, 32, concurrent) <= 1.1 * best


@pytest.mark.parametrize(
    ("heads", "tokens", "run_at_least", "blocks_at_least"),
    [(8, 4096, 1, 132), (8, 32768, 3, 2 * 132), (8, 131072, 15, 2 * 132), (64, 32768, 20, 2 * 132)],
)
def test_long_caches_have_long_runs_and_a_full_machine(planner, heads, tokens, run_at_least, blocks_at_least):
    made = plan(planner, 2, 128, 128, heads, tokens, 16, 128, 32)
    assert made["run"] >= run_at_least
    assert made["run_blocks"] >= blocks_at_least


@given(
    size=st.sampled_from([2, 4, 8]),
    dims=st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
    lag_size=st.one_of(st.integers(1, 5000), st.just(65536)),
    limit=st.sampled_from([48 << 10, 100 << 10]),
    aligned=st.booleans(),
    blend=st.booleans(),
)
@example(size=8, dims=(256, 256), lag_size=1, limit=48 << 10, aligned=True, blend=True)
@example(size=8, dims=(240, 240), lag_size=1, limit=48 << 10, aligned=True, blend=True)
def test_shared_memory_keeps_to_the_limit(planner, size, dims, lag_size, limit, aligned, blend):
    dims = (0, 0) if min(dims) == 0 else dims
    made = planner.plan_compress(
        *(size, *dims, 2, 3 * lag_size, 0, lag_size, 1),
        scores_wanted=True,
        aligned=aligned,
        blend=blend,
        device=planner.Device(shared_per_block=limit),
    )
    assert made["shared_bytes"] + 2048 <= limit
    assert made["shared_bytes"] % 16 == 0
    assert (made["scratch_bytes"] > 0) == (made["statistics_in_scratch"] or made["reference_in_scratch"])
    # Scratch is O(B H N): statistics of key and value (wide rows: and norms; a blend: of both scores) of one partition,
    # bounds (and anchors) of its channels.
    real, statistics, references = 8 if size == 8 else 4, 5 if blend else 3, 8 if blend else 6
    most = statistics * (lag_size + 4) + references * (max(dims) + 8)
    assert made["scratch_bytes"] <= made["run_blocks"] * real * most


@pytest.mark.parametrize("dims", [(128, 128), (300, 300)])
def test_every_lag_size_keeps_to_the_limit(planner, dims):
    """The kernels have static shared memory, too: the limit is met from 2,048 bytes below it on, for every size."""
    for lag_size in range(1, 9000):
        made = planner.plan_compress(4, *dims, 2, 3 * lag_size, 0, lag_size, 1, scores_wanted=True)
        assert made["shared_bytes"] + 2048 <= 48 << 10, lag_size


def test_usual_lag_sizes_need_no_scratch(planner):
    for size, dim, lag_size in itertools.product(
        [2, 4], [64, 80, 96, 128, 192, 256], [64, 128, 256, 512, 1024, 2048]
    ):
        made = plan(planner, size, dim, dim, 8, 4 * lag_size, 0, lag_size, lag_size // 4)
        assert made["scratch_bytes"] == 0, (size, dim, lag_size)


@given(
    columns=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    heads=st.integers(1, 400),
    access=st.sampled_from([2, 4, 8, 16]),
)
def test_moves_cover_every_column_once(planner, columns, heads, access):
    made = planner.plan_move(access, *columns, heads, 5, 100, planner.Device(**H100))
    for count, slices in zip(columns, (made["key_slices"], made["value_slices"]), strict=True):
        assert (slices - 1) * made["slice"] < count <= slices * made["slice"] or count == slices == 0
    assert made["blocks"] == heads * (made["key_slices"] + made["value_slices"])
    assert made["slice"] * access >= min(32, max(columns) * access), "narrower than a sector"
    assert made["slice"] <= 512, "a block moves at least one row a pass"
    assert planner.plan_move(access, *columns, heads, 100, 100, planner.Device(**H100))["blocks"] == 0


def test_more_blocks_than_a_grid_are_refused(planner):
    assert planner.grid_of(2**31 - 1) == 2**31 - 1
    with pytest.raises(RuntimeError, match="take 2147483648 thread blocks, CUDA launches at most 2147483647"):
        planner.grid_of(2**31)


# The kernels under other plans: results must not depend on them.

CASES = {
    "vectors": Case(2, 2, 3 + 7 * 24 + 5, 64, 64, 3, 24, 7, torch.float16, "offset"),
    "elements": Case(1, 3, 2 + 6 * 10, 7, 5, 2, 10, 3, torch.bfloat16),
    "wide": Case(1, 2, 1 + 4 * 12, 300, 257, 1, 12, 5, torch.float32, "offset"),
    "many-scores": Case(1, 1, 3 * 300, 8, 8, 0, 300, 77, torch.float16, "ties"),
    "float64": Case(1, 2, 5 * 16, 32, 16, 0, 16, 4, torch.float64),
    "nan": Case(1, 2, 4 * 20, 16, 16, 0, 20, 6, torch.float32, "nan"),
}
DEVICES = {
    "one multiprocessor: long runs": {"multiprocessors": 1},
    "no room: everything in scratch": {"shared_per_block": 2048},
    "long runs in scratch": {"shared_per_block": 2048, "multiprocessors": 1},
    "a thousand multiprocessors: short runs": {"multiprocessors": 1000},
}


METHODS = {
    "std": {"score": "std"},
    "cosine": {"score": "cosine"},
    "blend": {"score": "blend"},
    "smooth": {"smooth": 5},
    "blend-smooth-head": {"score": "blend", "smooth": 5, "budget": "head"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_the_plan(executor, name, device, method):
    from tests.simt import operators

    case = dataclasses.replace(CASES[name], **METHODS[method])
    key, value = (placed.view for placed in case.make(torch.device("cpu")))
    args = (case.start, case.lag_size, case.keep)
    usual = operators.compress(key, value, *args, **case.method)
    usual_score = operators.lag_score(key, value, *args[:2], **case.scoring)
    with operators.settings(device=DEVICES[device], order="random", seed=5):
        for check in CASE_CHECKS:
            if case.budget == "partition" or check is not check_compress:  # which knows no other budget
                check(executor, case)
        odd = operators.compress(key, value, *args, **case.method)
        odd_score = operators.lag_score(key, value, *args[:2], **case.scoring)
    for one, other in zip((*usual, usual_score), (*odd, odd_score), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_a_batch_does_not_change_scores(executor):
    """Threads and layout depend on the row alone: a head scores the same bits alone and among others."""
    from tests.simt import operators

    x = torch.randn(3, 5, 9 * 32, 64, generator=torch.Generator().manual_seed(1)).half()
    together = operators.lag_score(x, x.flip(3), 0, 32)
    alone = operators.lag_score(x[1:2, 2:3], x.flip(3)[1:2, 2:3], 0, 32)
    assert torch.equal(together[1:2, 2:3], alone)


def test_keeping_all_scores_nothing(executor):
    from tests.simt import operators

    x = torch.randn(1, 2, 100, 16)
    key, value, index = operators.compress(x, x + 1, 4, 16, 16)
    assert torch.equal(key, x)
    assert torch.equal(value, x + 1)
    assert torch.equal(index, torch.arange(100, dtype=torch.int32).expand(1, 2, 100))
    assert not [launch for launch in operators.last().launches() if launch["barriers"]]


@pytest.mark.parametrize("dims", [(0, 8), (8, 0), (0, 0), (0, 300), (300, 0)])
@pytest.mark.parametrize("score", ["std", "cosine"])
def test_rows_of_no_elements(executor, dims, score):
    """A tensor of no elements has no memory; the other one is compressed all the same."""
    from tests.simt import operators

    key, value = (torch.randn(1, 2, 30, dim, generator=torch.Generator().manual_seed(dim)) for dim in dims)
    wanted = reference.compress(key, value, 2, 8, 3, score=score)
    for one, other in zip(operators.compress(key, value, 2, 8, 3, score=score), wanted, strict=True):
        assert torch.equal(one, other)
    index = operators.compress_(key, value, 2, 8, 3, score=score)
    assert torch.equal(index, wanted[2])
    assert torch.equal(value[:, :, : index.shape[2]], wanted[1])


def test_wide_rows_of_a_long_partition(executor):
    """More tokens than a panel of 256, whose sums are added up one after the other."""
    case = Case(1, 1, 2 * 300, 257, 257, 0, 300, 7, torch.float32, score="cosine")
    check_lag_score(executor, case)


@pytest.mark.parametrize("count", [12_000, 60_000])
def test_topk_of_a_long_row(executor, count):
    """Beyond what shared memory holds."""
    score = torch.randn(1, count, generator=torch.Generator().manual_seed(count))
    assert torch.equal(executor.topk_index(score, 100), reference.topk_index(score, 100))


@pytest.mark.parametrize("dim", [1024, 4000])
def test_bounds_of_a_long_row(executor, dim):
    x = torch.randn(1, 1, 6, dim, generator=torch.Generator().manual_seed(dim))
    assert torch.equal(executor.partition_bounds(x, 0, 3), reference.partition_bounds(x, 0, 3))


@pytest.mark.parametrize("bad", [-1, 10, -(2**31), 2**31 - 1])
def test_compact_traps_outside(executor, bad):
    from tests.simt import operators

    x = torch.randn(1, 1, 10, 8)
    index = torch.tensor([[[0, 9, bad]]], dtype=torch.int32)
    with pytest.raises(simt.Fault, match="trap"):
        operators.compact(x, index)


@pytest.mark.parametrize("dims", [4, 5, 6])
def test_topk_of_scattered_rows(executor, dims):
    """Leading dimensions that no single stride joins; more than four of them are copied first."""
    from tests.simt import operators

    sizes = [2, 3, 2, 2, 3, 2][:dims]
    storage = torch.randn([n + 1 for n in sizes] + [40], generator=torch.Generator().manual_seed(dims))
    score = storage[tuple(slice(0, n) for n in sizes)]
    assert torch.equal(operators.topk_index(score, 9), reference.topk_index(score, 9))


def test_output_length_is_the_planner_s(planner):
    for length, start, lag_size, keep in itertools.product([0, 1, 50, 51], [0, 3, 60], [1, 7, 25], [1]):
        made = planner.plan_compress(2, 8, 8, 1, length, start, lag_size, keep)
        copied = length - made["partitions"] * lag_size
        assert copied + made["partitions"] * keep == formulas.output_length(length, start, lag_size, keep)


@given(
    dim=st.sampled_from((1, 3, 8, 64, 80, 257)),
    lag_size=st.integers(2, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_rows_along_one_channel_have_one_direction(executor, dim, lag_size, dtype, seed):
    """Exactly, whatever their lengths: the division by the norm rounds as a division does (the CPU kernels multiply
    by its inverse, within the tolerance)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 1, 3 * lag_size, dim, dtype=dtype)
    x[..., seed % dim] = (torch.rand(1, 1, 3 * lag_size, generator=generator) + 0.1).to(dtype)
    score = executor.lag_score(x, x, 0, lag_size, score="cosine")
    assert torch.equal(score, torch.zeros_like(score))
