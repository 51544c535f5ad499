"""Memory traffic of the ragged CUDA kernels, counted by the executor: as test_traffic.py for the dense ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.cuda.test_traffic import RUNS, nbytes, operators, reads, writes  # noqa: F401
from tests.ops.ragged_cases import HND, NHD, RaggedCase

# Sequences of a batch that decodes: long, short, too short to lose anything. Starts and capacity are whole sectors of
# the index, as rows are.
LLAMA = RaggedCase(
    sequences=((16, 16 + 6 * 128 + 37), (16, 100), (8, 8 + 3 * 128)),
    heads=2,
    key_dim=128,
    value_dim=128,
    lag_size=128,
    keep=32,
    dtype=torch.bfloat16,
    spare=3,
    block_size=16,
)
CASES = {
    "llama 3.1 8b": LLAMA,
    "llama, HND": dataclasses.replace(LLAMA, key_layout=HND, value_layout=HND),
    "llama, large pages": dataclasses.replace(LLAMA, block_size=64),
    "phi 2": dataclasses.replace(LLAMA, key_dim=80, value_dim=80),
    "deepseek v2 lite": dataclasses.replace(LLAMA, key_dim=192),
    "float32": dataclasses.replace(LLAMA, heads=1, dtype=torch.float32, key_layout=NHD),
}


@dataclasses.dataclass
class Expected:
    """Bytes of one call, counted on paper."""

    case: RaggedCase
    device: str

    @property
    def row(self) -> int:
        size = torch.empty((), dtype=self.case.dtype).element_size()
        return (self.case.key_dim + self.case.value_dim) * size * self.case.heads

    @property
    def partitions(self) -> int:
        return sum(self.case.compressed(b) for b in range(self.case.batch))

    @property
    def runs(self) -> int:
        """Every run looks at one partition more than it scores."""
        if self.device == "short runs":
            return self.partitions
        return sum(self.case.compressed(b) > 0 for b in range(self.case.batch))

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.case.sequences)

    @property
    def scored(self) -> int:
        return (self.partitions + self.runs) * self.case.lag_size * self.row

    @property
    def kept(self) -> int:
        return self.partitions * self.case.keep * self.row

    @property
    def moved(self) -> int:
        """Rows from start to the new length of the sequences that lose tokens."""
        count = sum(
            self.case.new_length(b) - self.case.sequences[b][0]
            for b in range(self.case.batch)
            if self.case.compressed(b)
        )
        return count * self.row

    @property
    def bound(self) -> float:
        """(1 + 1/R + ratio) times the tokens that there are."""
        run = self.partitions / self.runs
        return (1 + 1 / run + self.case.keep / self.case.lag_size) * self.tokens * self.row


def rows_read(launch: dict, case: RaggedCase) -> int:
    """Bytes read in accesses of 16 bytes: rows, not numbers."""
    return sum(
        site["useful_bytes"]
        for site in launch["sites"]
        if site["access"] == "global_read" and site["size"] == 16
    )


def assert_efficient(launch: dict, rows: int, numbers: float = 0.03) -> None:
    """Sector efficiency of the rows; numbers that all threads ask for are 4 bytes of a sector, but few."""
    assert rows_read(launch, LLAMA) == rows
    assert reads(launch) - rows <= numbers * rows, "numbers: the sequences, where rows lie, what is kept"
    for site in launch["sites"]:
        if site["access"] == "global_read" and site["size"] == 16:
            assert site["sector_efficiency"] >= 0.95
    assert launch["global_read"]["sector_efficiency"] >= 0.9


@pytest.mark.parametrize("score", ["std", "cosine"])
@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("form", ["slots", "pages"])
@pytest.mark.parametrize("name", CASES)
def test_in_place(operators, name, form, device, score):  # noqa: F811
    case = CASES[name]
    expected = Expected(case, device)
    pairs = case.make()
    start, length = case.numbers()
    with operators.settings(device=RUNS[device]):
        if form == "slots":
            key, value = case.slots(pairs)
            index = operators.compress_ragged_(
                key.view, value.view, start, length, case.lag_size, case.keep, score=score
            )
        else:
            key, value, table = case.pages(pairs)
            index = operators.compress_paged_(
                key.view, value.view, table, start, length, case.lag_size, case.keep, score=score
            )
    *before, scoring, move = operators.last().launches()
    assert len(before) == (1 if form == "slots" else 2), "the schedule; pages are looked at"
    for launch in before:
        assert reads(launch) + writes(launch) <= 4 * (40 * case.batch + 20) + 4 * index.numel()
    assert_efficient(scoring, expected.scored)
    assert writes(scoring) == nbytes(index), "scoring writes the index, every entry once, and no scratch"
    # Warps that write neighbouring entries share a sector.
    assert scoring["global_write"]["sector_efficiency"] >= 0.9
    assert rows_read(move, case) == writes(move) == expected.moved
    assert move["global_write"]["sector_efficiency"] >= 0.95
    # Rows are whole sectors; the index and the block tables are 4 bytes of one each.
    assert move["global_read"]["sector_efficiency"] >= 0.7
    assert reads(scoring) + reads(move) <= expected.bound + 2 * nbytes(index) + 0.03 * expected.scored


@pytest.mark.parametrize("score", ["std", "cosine"])
@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_packed(operators, name, device, score):  # noqa: F811
    case = CASES[name]
    expected = Expected(case, device)
    key, value = case.packed(case.make())
    start, _ = case.numbers()
    with operators.settings(device=RUNS[device]):
        outputs = operators.compress_varlen(
            key.view[:, 0], value.view[:, 0], case.cu_seqlens(), start, case.lag_size, case.keep, score=score
        )
    schedule, compress = operators.last().launches()
    assert reads(schedule) + writes(schedule) <= 4 * (40 * case.batch + 20)
    rows = expected.tokens * expected.row + expected.runs * case.lag_size * expected.row + expected.kept
    assert_efficient(compress, rows)
    assert compress["global_write"]["sector_efficiency"] >= 0.95
    assert reads(compress) <= expected.bound + 2 * nbytes(outputs[2]) + 0.03 * rows
    new_rows = sum(case.new_length(b) for b in range(case.batch)) * expected.row
    assert writes(compress) == new_rows + nbytes(outputs[2]), "kept rows and the index, each byte once"


METHOD = {"score": "blend", "smooth": 3, "budget": "head"}


@pytest.mark.parametrize("form", ["slots", "pages"])
def test_scores_in_place(operators, form):  # noqa: F811
    """Rows from the sink on move, each once; a blend asks for rows twice, the second time from L2."""
    case, sink = CASES["llama 3.1 8b"], 4
    expected = Expected(case, "one run a head")
    start, length = case.numbers()
    pairs = case.make()
    with operators.settings(device=RUNS["one run a head"]):
        if form == "slots":
            key, value = case.slots(pairs)
            scores = torch.zeros(key.view.shape[:3])
            arguments = (key.view, value.view, start, length)
            call = operators.compress_ragged_
        else:
            key, value, table = case.pages(pairs)
            scores = torch.zeros(key.view.shape[:3])
            arguments = (key.view, value.view, table, start, length)
            call = operators.compress_paged_
        call(*arguments, case.lag_size, case.keep, **METHOD, scores=scores, sink_size=sink)
    scoring, choice, move = operators.last().launches()[-3:]
    assert rows_read(scoring, case) == 2 * expected.scored
    lost = [b for b in range(case.batch) if case.compressed(b)]
    earlier = 4 * case.heads * sum(case.sequences[b][0] - sink for b in lost)
    kept = 4 * case.heads * sum(case.new_start(b) - sink for b in lost)
    assert writes(choice) == earlier + 2 * kept, "into the scores; of the kept rows index and score"
    moved = expected.moved + sum(case.sequences[b][0] - sink for b in lost) * expected.row
    assert rows_read(move, case) == writes(move) == moved


def test_packed_rows_are_gathered_once(operators):  # noqa: F811
    case = CASES["llama 3.1 8b"]
    expected = Expected(case, "one run a head")
    key, value = case.packed(case.make())
    start, _ = case.numbers()
    with operators.settings(device=RUNS["one run a head"]):
        operators.compress_varlen(
            key.view[:, 0], value.view[:, 0], case.cu_seqlens(), start, case.lag_size, case.keep, **METHOD
        )
    _, scoring, _, *gathers = operators.last().launches()
    assert rows_read(scoring, case) == 2 * expected.scored
    new_rows = sum(case.new_length(b) for b in range(case.batch)) * expected.row
    assert sum(rows_read(launch, case) for launch in gathers) == new_rows
    assert sum(map(writes, gathers)) == new_rows


def test_nothing_to_do_reads_no_row(operators):  # noqa: F811
    case = dataclasses.replace(LLAMA, sequences=((16, 271), (200, 300), (0, 0)))
    start, length = case.numbers()
    key, value, table = case.pages(case.make())
    operators.compress_paged_(key.view, value.view, table, start, length, case.lag_size, case.keep)
    launches = operators.last().launches()
    assert sum(rows_read(launch, case) for launch in launches) == 0
    assert len(launches) == 4
    index = case.batch * case.heads * table.shape[1] * case.block_size * 4
    assert writes(launches[2]) == index
    assert writes(launches[3]) == 0
