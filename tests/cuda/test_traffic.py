"""Memory traffic of the CUDA kernels, counted by the executor: what design and kernel comments promise.

Bytes are those that requests of warps ask for (lanes that ask for the same bytes count once). Shapes are those of the
benchmarks, with fewer tokens and heads.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lagkv_ext import formulas
from tests import simt
from tests.ops.backends import Unavailable, make_simt


@pytest.fixture(scope="module")
def operators():
    try:
        make_simt()
        simt.module()
    except Unavailable as reason:
        pytest.skip(str(reason))
    from tests.simt import operators

    return operators


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's cache, cut short: H heads of the model's, `partitions` that lose tokens, and some left over."""

    dim: int
    value_dim: int = 0
    heads: int = 2
    lag_size: int = 128
    keep: int = 32
    partitions: int = 6
    dtype: torch.dtype = torch.bfloat16
    bnhd: bool = False  #: memory order [B, N, H, D]

    @property
    def length(self) -> int:
        return 16 + (self.partitions + 1) * self.lag_size + 37

    def tensors(self) -> tuple[Tensor, Tensor]:
        made = []
        for number, dim in enumerate((self.dim, self.value_dim or self.dim)):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(1, self.length, self.heads, dim, generator=generator).to(self.dtype)
            made.append(x.transpose(1, 2) if self.bnhd else x.transpose(1, 2).contiguous())
        return made[0], made[1]


SHAPES = {
    "llama 3.1 8b": Shape(128),
    "llama 3.1 8b, 1/8 kept": Shape(128, keep=16),
    "llama, memory order of attention": Shape(128, bnhd=True),
    "qwen 2.5 0.5b": Shape(64),
    "gemma 3 270m": Shape(256, heads=1),
    "phi 3 mini": Shape(96),
    "phi 2": Shape(80),
    "deepseek v2 lite": Shape(192, value_dim=128),
    "lag_size 1024": Shape(64, heads=1, lag_size=1024, keep=256, partitions=3),
    "float32": Shape(128, dtype=torch.float32, heads=1),
    "float64": Shape(64, dtype=torch.float64, heads=1),
}
RUNS = {
    "short runs": {"multiprocessors": 1000},
    "one run a head": {"multiprocessors": 1, "shared_per_multiprocessor": 1},
}


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def reads(counts: dict) -> int:
    return counts["global_read"]["useful_bytes"]


def writes(counts: dict) -> int:
    return counts["global_write"]["useful_bytes"]


def run_of(operators, shape: Shape, device: dict) -> int:
    size = torch.empty((), dtype=shape.dtype).element_size()
    module = simt.module()
    return module.plan_compress(
        *(
            size,
            shape.dim,
            shape.value_dim or shape.dim,
            shape.heads,
            shape.length,
            16,
            shape.lag_size,
            shape.keep,
        ),
        device=module.Device(**device),
    )["run"]


@pytest.mark.parametrize("score", ["std", "cosine"])
@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("name", SHAPES)
def test_compress(operators, name, device, score):
    shape = SHAPES[name]
    key, value = shape.tensors()
    run = run_of(operators, shape, RUNS[device])
    assert run == (1 if device == "short runs" else shape.partitions)
    with operators.settings(device=RUNS[device]):
        outputs = operators.compress(key, value, 16, shape.lag_size, shape.keep, score=score)
    counts = operators.last().counts()
    index = outputs[2]

    row = (key.shape[3] + value.shape[3]) * key.element_size() * shape.heads
    runs = -(-shape.partitions // run)
    kept = shape.partitions * shape.keep
    # Every row once, a reference partition per run, the kept rows again; the index for the copies of K and V.
    rows = (shape.length + runs * shape.lag_size + kept) * row
    assert reads(counts) <= rows + 2 * nbytes(index)
    assert reads(counts) >= rows
    ratio = shape.keep / shape.lag_size
    inputs = nbytes(key) + nbytes(value)
    assert reads(counts) <= (1 + 1 / run + ratio) * inputs + 2 * nbytes(index)
    assert counts["global_read"]["unique_bytes"] <= inputs + nbytes(index)
    assert writes(counts) == sum(map(nbytes, outputs)), "nothing but the outputs, each byte once"
    assert counts["global_read"]["sector_efficiency"] >= 0.95
    assert counts["global_write"]["sector_efficiency"] >= 0.95
    assert len(operators.last().launches()) == 1


@pytest.mark.parametrize(
    "name", ["llama 3.1 8b", "llama, memory order of attention", "phi 2", "deepseek v2 lite", "float64"]
)
def test_compress_in_place(operators, name):
    shape = SHAPES[name]
    key, value = shape.tensors()
    inputs = nbytes(key) + nbytes(value)
    index = operators.compress_(key, value, 16, shape.lag_size, shape.keep)
    launches = operators.last().launches()
    assert [launch["kernel"] for launch in launches] == ["compress_kernel", "move_kernel"]
    score, move = launches
    row = (key.shape[3] + value.shape[3]) * key.element_size() * shape.heads

    assert writes(score) == nbytes(index), "scoring writes the index and no scratch"
    assert reads(score) <= 2 * (shape.partitions + 1) * shape.lag_size * row
    # Only rows behind the prefix move, each in and out once; every slice of a row asks for its index.
    moved = (index.shape[2] - 16) * row
    assert writes(move) == moved
    assert (
        moved <= reads(move) <= moved + 4 * (index.shape[2] - 16) * shape.heads * (row // shape.heads // 32)
    )
    assert writes(move) + writes(score) <= inputs
    assert move["global_write"]["sector_efficiency"] >= 0.95
    assert (
        move["global_read"]["sector_efficiency"] >= 0.75
    )  # rows are whole sectors; their index is 4 bytes of one


@pytest.mark.parametrize("name", ["llama 3.1 8b", "phi 2", "float64"])
def test_options_in_place(operators, name):
    """A blend asks for its rows twice, the second time from L2. With one budget for a head scores go through memory."""
    shape = SHAPES[name]
    key, value = shape.tensors()
    method = {"score": "blend", "smooth": 3}
    with operators.settings(device=RUNS["one run a head"]):
        operators.compress_(key, value, 16, shape.lag_size, shape.keep, **method)
        assert len(operators.last().launches()) == 2, "to select, and to move"
        key, value = shape.tensors()
        index = operators.compress_(key, value, 16, shape.lag_size, shape.keep, **method, budget="head")
    score, choice, move = operators.last().launches()
    row = (key.shape[3] + value.shape[3]) * key.element_size() * shape.heads
    size = 8 if shape.dtype == torch.float64 else 4
    scores = size * shape.heads * shape.partitions * shape.lag_size
    chosen = 4 * shape.heads * shape.partitions * shape.keep
    rows = (shape.partitions + 1) * shape.lag_size * row
    assert reads(score) == 2 * rows
    assert score["global_read"]["unique_bytes"] == rows
    assert writes(score) == scores + nbytes(index) - chosen
    assert reads(choice) == scores * (size + 1), "once per 8 bits of the score's type, and to compact"
    assert writes(choice) == chosen
    assert writes(move) == (index.shape[2] - 16) * row


def test_carried_scores_are_read_and_written_once(operators):
    shape, earlier = SHAPES["llama 3.1 8b"], 12
    key, value = shape.tensors()
    carried = torch.zeros(1, shape.heads, earlier)
    outputs = operators.compress_carried(key, value, carried, 16, shape.lag_size, shape.keep)
    _, choice, *copies = operators.last().launches()
    rivals = 4 * shape.heads * (earlier + shape.partitions * shape.lag_size)
    new = nbytes(outputs[3])
    assert reads(choice) == nbytes(carried) + 5 * rivals + new
    assert writes(choice) == nbytes(carried) + 2 * new, "into the scores; of the kept rows index and score"
    assert sum(map(writes, copies)) == nbytes(outputs[0]) + nbytes(outputs[1])


@pytest.mark.parametrize("name", ["llama 3.1 8b", "phi 2", "float32"])
def test_stages(operators, name):
    shape = SHAPES[name]
    key, value = shape.tensors()
    full = shape.partitions + 1
    side = shape.lag_size * key.shape[3] * key.element_size() * shape.heads

    bounds = operators.partition_bounds(key, 16, shape.lag_size)
    counts = operators.last().counts()
    assert reads(counts) == full * side
    assert writes(counts) == nbytes(bounds)
    assert counts["global_read"]["sector_efficiency"] == 1.0

    with operators.settings(device=RUNS["one run a head"]):
        score = operators.lag_score(key, value, 16, shape.lag_size)
    counts = operators.last().counts()
    assert reads(counts) == 2 * full * side
    assert writes(counts) == nbytes(score)

    index = operators.topk_index(score, shape.keep)
    counts = operators.last().counts()
    assert reads(counts) == nbytes(score), "every score is read once"
    assert writes(counts) == nbytes(index)

    rows = index.flatten(2)
    out = operators.compact(key, rows)
    counts = operators.last().counts()
    # A row of 10 vectors lies in two warps now and then: both ask for its index.
    assert nbytes(out) <= reads(counts) <= nbytes(out) + 2 * nbytes(rows)
    assert writes(counts) == nbytes(out)
    assert counts["global_write"]["sector_efficiency"] == 1.0


@pytest.mark.parametrize("dim", [7, 100, 600])
def test_rows_that_are_not_vectors(operators, dim):
    """Element by element, but still once where lanes can hold a row; a wide row is read several times."""
    shape = Shape(dim, heads=1, lag_size=32, keep=8, partitions=3, dtype=torch.float16)
    key, value = (x[..., :dim] for x in dataclasses.replace(shape, dim=dim + 1).tensors())
    with operators.settings(device=RUNS["one run a head"]):
        outputs = operators.compress(key, value, 16, 32, 8)
    counts = operators.last().counts()
    inputs = nbytes(key) + nbytes(value)
    bound = (1 + 1 / 3 + 8 / 32) * inputs if dim <= 256 else 5 * inputs
    assert reads(counts) <= bound + 2 * nbytes(outputs[2])
    assert counts["global_read"]["unique_bytes"] <= inputs + nbytes(outputs[2])
    assert writes(counts) == sum(map(nbytes, outputs))


def test_scratch_holds_statistics_alone(operators):
    """A partition whose statistics do not fit in shared memory: they go to scratch, the rows are still read once."""
    shape = Shape(64, heads=1, lag_size=512, keep=128, partitions=2, dtype=torch.float16)
    key, value = shape.tensors()
    device = {**RUNS["one run a head"], "shared_per_block": 2048}
    with operators.settings(device=device):
        outputs = operators.compress(key, value, 16, 512, 128)
    counts = operators.last().counts()
    module = simt.module()
    made = module.plan_compress(2, 64, 64, 1, shape.length, 16, 512, 128, device=module.Device(**device))
    assert made["scratch_bytes"] == 2 * 4 * 512
    inputs = nbytes(key) + nbytes(value)
    written = sum(map(nbytes, outputs)) + made["scratch_bytes"]
    assert counts["global_write"]["unique_bytes"] == written
    assert counts["global_read"]["unique_bytes"] <= inputs + nbytes(outputs[2]) + made["scratch_bytes"]


def test_no_bank_conflict_worth_mentioning(operators):
    """Bank conflicts add less than a third of the fused kernel's shared-memory passes."""
    shape = SHAPES["llama 3.1 8b"]
    key, value = shape.tensors()
    operators.compress(key, value, 16, shape.lag_size, shape.keep)
    counts = operators.last().counts()
    for kind in ("shared_read", "shared_write"):
        assert counts[kind]["extra_wavefronts"] <= counts[kind]["wavefronts"] / 3
    output = formulas.output_length(shape.length, 16, shape.lag_size, shape.keep)
    assert output == shape.length - shape.partitions * (shape.lag_size - shape.keep)
