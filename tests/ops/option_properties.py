"""Properties of scores that are carried between compressions, of every operator that takes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lagkv_ext import reference
from lagkv_ext.formulas import arithmetic_dtype
from tests.ops import ragged_properties
from tests.ops.backends import Backend
from tests.ops.cases import CANARY, Case, Layout, Placed, bits, place
from tests.ops.compare import assert_bits, assert_head_selection
from tests.ops.properties import rows, untouched
from tests.ops.ragged_cases import RaggedCase


def assert_equal_scores(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal numbers: a zero may have another sign, a NaN other bits."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def make_scores(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers like scores, with ties, both zeros, infinities and NaN of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if seed % 2:
        x = x.round()
    special = torch.tensor([-0.0, math.nan, -math.nan, math.inf, -math.inf], dtype=torch.float64)
    pick = torch.randint(0, 5, shape, generator=generator)
    rare = torch.rand(shape, generator=generator) < 0.05
    return torch.where(rare, special[pick], x).to(arithmetic_dtype(dtype))


def canaries(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.empty(shape, dtype=arithmetic_dtype(dtype))
    bits(x).fill_(CANARY[x.dtype])
    return x


def place_scores(x: Tensor, layout: Layout, device: torch.device) -> tuple[Placed, Tensor]:
    """``x`` of three dimensions in a storage full of canaries, and the view of it that an operator takes."""
    placed = place(x.unsqueeze(-1), layout, device)
    return placed, placed.view[..., 0]


def check_carried(backend: Backend, case: Case, earlier: int) -> None:
    """compress_carried chooses as the reference does among the backend's own scores."""
    carried = make_scores((case.batch, case.heads, earlier), case.dtype, case.seed).to(backend.device)
    if case.seed % 3 == 0:
        carried = carried.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = case.make(backend.device)
    before = carried.clone()
    sizes = case.start, case.lag_size, case.keep
    with untouched(key, value):
        new_key, new_value, index, after = backend.compress_carried(
            key.view, value.view, carried, *sizes, **case.scoring
        )
    assert_bits(carried, before, "carried")
    wanted = expected_choice(backend, case, key.view, value.view, carried)
    assert_bits(index, wanted[0], "index")
    assert_bits(new_key, rows(key.view, index), "key")
    assert_bits(new_value, rows(value.view, index), "value")
    assert_equal_scores(after, wanted[1], "carried")
    for output in (new_key, new_value, index):
        assert output.is_contiguous(), "an output is not contiguous"


def check_carried_in_place(backend: Backend, case: Case, earlier: int) -> None:
    """compress_ with scores that go with the rows does the same, and writes nothing else."""
    carried = make_scores((case.batch, case.heads, earlier), case.dtype, case.seed).to(backend.device)
    sink = case.start - earlier
    held = min(case.length, case.start)
    x = canaries((case.batch, case.heads, case.length), case.dtype)
    x[:, :, sink:held] = carried[:, :, : max(0, held - sink)].cpu()
    placed, scores = place_scores(x, case.value_layout, backend.device)
    key, value = case.make(backend.device)
    wanted = expected_choice(backend, case, key.view, value.view, carried)
    old = [p.view.clone() for p in (key, value)]
    before, outside = placed.storage.clone(), placed.outside()
    index = backend.compress_(
        key.view, value.view, case.start, case.lag_size, case.keep,
        **case.scoring, budget="head", scores=scores, sink_size=sink,
    )  # fmt: skip
    assert_bits(index, wanted[0], "index")
    for p, rows_before, name in zip((key, value), old, ("key", "value"), strict=True):
        assert_bits(p.view[:, :, : index.shape[2]], rows(rows_before, index), name)
    assert_bits(placed.storage[outside], before[outside], "memory around scores")
    after = case.start + case.keep * case.compressed if case.compressed else held
    assert_equal_scores(
        scores[:, :, sink:after], wanted[1][:, :, : max(0, after - sink)].to(scores.dtype), "scores"
    )
    for part, first in ((scores[:, :, :sink], 0), (scores[:, :, after:], after)):
        assert_bits(part, x.to(backend.device)[:, :, first : first + part.shape[2]], "an unused score")


def expected_choice(
    backend: Backend, case: Case, key: Tensor, value: Tensor, carried: Tensor
) -> tuple[Tensor, Tensor]:
    scores = backend.lag_score(key, value, case.start, case.lag_size, **case.scoring)
    return reference.head_index(scores, carried, case.start, case.keep, case.length)


def check_scored_slots(backend: Backend, case: RaggedCase, sink_size: int) -> None:
    """Every slot as compress_carried leaves it alone."""
    pairs = case.make(backend.device)
    placed = case.slots(pairs, backend.device)
    start, length = case.numbers(backend.device)
    shape = (case.batch, case.heads, case.most + case.spare)
    x = make_scores(shape, case.dtype, case.seed)
    memory, scores = place_scores(x, case.key_layout, backend.device)
    before, outside = memory.storage.clone(), memory.outside()
    index = backend.compress_ragged_(
        *(p.view for p in placed), start, length, case.lag_size, case.keep,
        **case.scoring, budget="head", scores=scores, sink_size=sink_size,
    )  # fmt: skip
    assert start.tolist() == [case.new_start(b) for b in range(case.batch)]
    assert length.tolist() == [case.new_length(b) for b in range(case.batch)]
    assert_bits(memory.storage[outside], before[outside], "memory around scores")
    for b in range(case.batch):
        new = [p.view[b : b + 1, :, : case.new_length(b)] for p in placed]
        old_scores = x[b : b + 1].to(backend.device)
        assert_alone(
            backend, case, b, sink_size, pairs[b], new, index[b : b + 1], old_scores, scores[b : b + 1]
        )


def check_scored_pages(backend: Backend, case: RaggedCase, sink_size: int) -> None:
    """Every sequence in pages as compress_carried leaves it alone; scores of no row in use are not written."""
    pairs = case.make(backend.device)
    key, value, table = case.pages(pairs, backend.device)
    start, length = case.numbers(backend.device)
    x = make_scores(tuple(key.view.shape[:3]), case.dtype, case.seed)
    memory, scores = place_scores(x, case.value_layout, backend.device)
    before, outside = memory.storage.clone(), memory.outside()
    index = backend.compress_paged_(
        key.view, value.view, table, start, length, case.lag_size, case.keep,
        **case.scoring, budget="head", scores=scores, sink_size=sink_size,
    )  # fmt: skip
    assert start.tolist() == [case.new_start(b) for b in range(case.batch)]
    assert length.tolist() == [case.new_length(b) for b in range(case.batch)]
    assert_bits(memory.storage[outside], before[outside], "memory around scores")
    used = torch.zeros(scores.shape[:2], dtype=torch.bool)
    for b, (_, tokens) in enumerate(case.sequences):
        block, row = case.place_of(table[b], case.new_length(b))
        new = [p.view[block, row].transpose(0, 1)[None] for p in (key, value)]
        block, row = case.place_of(table[b], tokens)
        used[block.cpu(), row.cpu()] = True
        old_scores = x.to(backend.device)[block, row].T[None]
        assert_alone(
            backend,
            case,
            b,
            sink_size,
            pairs[b],
            new,
            index[b : b + 1],
            old_scores,
            scores[block, row].T[None],
        )
    assert_bits(scores.cpu()[~used], x[~used], "a score of no row")


def assert_alone(
    backend: Backend,
    case: RaggedCase,
    b: int,
    sink_size: int,
    pair: tuple[Tensor, Tensor],
    new: list[Tensor],
    index: Tensor,
    old_scores: Tensor,
    scores: Tensor,
) -> None:
    """Rows ``new``, ``index`` and ``scores [1, H, rows]`` of a sequence are those of compress_carried alone."""
    start, _ = case.sequences[b]
    sink, after, count = min(sink_size, start), case.new_start(b), case.new_length(b)
    kept = index[:, :, :count]
    assert (index[:, :, count:] == -1).all(), "index past the new length is not -1"
    for x, mine, name in zip(pair, new, ("key", "value"), strict=True):
        assert_bits(mine, rows(x, kept), f"{name} of sequence {b}")
    if not case.compressed(b):
        assert_bits(kept, torch.arange(count, dtype=torch.int32, device=kept.device).expand_as(kept), "index")
        assert_bits(scores, old_scores, f"scores of sequence {b}")
        return
    if backend.sums_by_alignment:  # alone, a row lies elsewhere, and its sums may be taken in another order
        carried, after_scores = old_scores[:, :, sink:start], scores[:, :, sink:after]
        band = ragged_properties.band_of(case, pair, start)
        length = case.sequences[b][1]
        assert_head_selection(kept, band, carried, length, start, case.keep, after_scores)
    else:
        assert_alone_bits(
            backend, case, pair, kept, old_scores[:, :, sink:start], start, scores[:, :, sink:after]
        )
    assert_bits(scores[:, :, :sink], old_scores[:, :, :sink], "a score of the sink")
    assert_bits(scores[:, :, after:], old_scores[:, :, after:], "a score past the new start")


def assert_alone_bits(
    backend: Backend,
    case: RaggedCase,
    pair: tuple[Tensor, Tensor],
    kept: Tensor,
    carried: Tensor,
    start: int,
    after: Tensor,
) -> None:
    # Keeping none more than before leaves the best of what keeping one more does.
    keep, sink = max(case.keep, 1), start - carried.shape[2]
    alone = backend.compress_carried(*pair, carried, start, case.lag_size, keep, **case.scoring)
    if case.keep == 0:
        best = reference.topk_index(alone[3], carried.shape[2]).long()
        left = (
            alone[2][:, :, :sink],
            alone[2].gather(2, best + sink),
            alone[2][:, :, sink + alone[3].shape[2] :],
        )
        alone = *alone[:2], torch.cat(left, dim=2), alone[3].gather(2, best)
    assert_bits(kept, alone[2], "index")
    assert_equal_scores(after, alone[3], "scores")
