"""Smoothing, the blended score, and one budget for a head with carried scores: properties of the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lagkv_ext import formulas, reference

SCORES = ("std", "cosine", "blend")


class Case(NamedTuple):
    key: Tensor
    value: Tensor
    sink: int
    lag_size: int
    keep: int
    scoring: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.key.shape[2]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lag_size = draw(st.integers(1, 9))
    sink = draw(st.integers(0, 5))
    tokens = sink + draw(st.integers(0, 7)) * lag_size + draw(st.integers(0, lag_size - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dims = draw(st.tuples(st.sampled_from((1, 2, 5)), st.sampled_from((1, 3))))
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 2)), tokens
    key, value = (torch.randn(*shape, dim, generator=generator, dtype=torch.float64) for dim in dims)
    if draw(st.booleans()):  # few different rows: ties within and between partitions
        key, value = key.round(), value.round()
    if draw(st.booleans()) and tokens:
        key[..., draw(st.integers(0, tokens - 1)), 0] = draw(st.sampled_from((math.nan, math.inf, 0.0)))
    scoring = {
        "score": draw(st.sampled_from(SCORES)),
        "value_weight": draw(st.sampled_from((0.0, 0.5, 1.0))),
        "smooth": draw(st.sampled_from((1, 3, 5, 99))),
    }
    return Case(key, value, sink, lag_size, draw(st.integers(1, lag_size)), scoring)


def rank(score: float) -> float:
    """Scores as selection compares them: NaN is highest."""
    return math.inf if math.isnan(score) else score


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(123.0, 1e300, -1e300), b.nan_to_num(123.0, 1e300, -1e300))


class Stream:
    """A cache that reads rows in pieces and compresses with carried scores; ``seen[b][h]``: tokens of its rows."""

    def __init__(self, case: Case):
        self.case, self.start = case, case.sink
        batch, heads = case.key.shape[:2]
        self.key, self.value = case.key[:, :, :0], case.value[:, :, :0]
        self.carried = torch.empty(batch, heads, 0, dtype=torch.float64)
        self.seen = torch.empty(batch, heads, 0, dtype=torch.long)
        self.dropped: list[
            tuple[float, float]
        ] = []  # highest dropped, lowest kept, of a head and compression

    def read(self, begin: int, end: int) -> None:
        case = self.case
        self.key = torch.cat([self.key, case.key[:, :, begin:end]], dim=2)
        self.value = torch.cat([self.value, case.value[:, :, begin:end]], dim=2)
        new = torch.arange(begin, end).expand(*self.seen.shape[:2], -1)
        self.seen = torch.cat([self.seen, new], dim=2)
        size = case.lag_size, case.keep
        new_scores = reference.lag_score(self.key, self.value, self.start, case.lag_size, **case.scoring)
        rivals = torch.cat([self.carried, new_scores.flatten(2)], dim=2)
        compressed = new_scores.shape[2]
        self.key, self.value, index, self.carried = reference.compress_carried(
            self.key, self.value, self.carried, self.start, *size, **case.scoring
        )
        for b in range(index.shape[0]):
            for h in range(index.shape[1]):
                kept = set(index[b, h].tolist())
                ranked = [(rank(s), i + case.sink in kept) for i, s in enumerate(rivals[b, h].tolist())]
                out, stay = ([s for s, k in ranked if k is flag] for flag in (False, True))
                if out and compressed:
                    self.dropped.append((max(out), min(stay)))
        self.seen = self.seen.gather(2, index.long())
        self.start += case.keep * compressed


@given(st.integers(1, 9), st.sampled_from((1, 3, 5, 99)), st.integers(0, 2**20))
@example(1, 3, 0)
@example(2, 3, 0)
def test_smoothing_is_the_mean_of_neighbours_within_the_partition(length, smooth, seed):
    score = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, result in zip(
        score.view(-1, length), reference.smoothed(score, smooth).view(-1, length), strict=True
    ):
        for t in range(length):
            near = row[max(0, t - smooth // 2) : t + smooth // 2 + 1]
            assert result[t].item() == pytest.approx(near.mean().item(), abs=1e-12)
    assert torch.equal(reference.smoothed(score, 1), score)


@given(cases())
def test_smoothing_does_not_reach_the_next_partition(case):
    scoring = {**case.scoring, "smooth": 1}
    one = reference.lag_score(case.key, case.value, case.sink, case.lag_size, **scoring)
    many = reference.lag_score(case.key, case.value, case.sink, case.lag_size, **case.scoring)
    for p in range(one.shape[2]):
        alone = reference.smoothed(one[:, :, p : p + 1], case.scoring["smooth"])
        assert equal(many[:, :, p : p + 1], alone)


@given(cases())
def test_blend_is_the_cosine_plus_the_papers_score_in_units_of_its_mean(case):
    tiles = [x[:, :, case.sink :] for x in (case.key, case.value)]
    arguments = case.sink, case.lag_size
    weight = case.scoring["value_weight"]
    scoring = {"value_weight": weight}
    std = reference.lag_score(case.key, case.value, *arguments, score="std", **scoring)
    blend = reference.lag_score(case.key, case.value, *arguments, score="blend", **scoring)
    count, size = std.shape[2], case.lag_size
    expected = size * std
    for x, w in zip(tiles, (1.0, weight), strict=True):
        for p in range(count):
            rows, after = x[:, :, p * size : (p + 1) * size], x[:, :, (p + 1) * size : (p + 2) * size]
            anchor = torch.nn.functional.normalize(after, dim=-1).mean(dim=2, keepdim=True)
            expected[:, :, p] -= w * torch.nn.functional.cosine_similarity(rows, anchor, dim=-1, eps=1e-300)
    finite = expected.isfinite()
    assert torch.allclose(blend[finite], expected[finite], atol=1e-9)
    assert blend[~finite].isnan().all()


@given(cases())
def test_length_order_and_protected_rows(case):
    arguments = case.sink, case.lag_size, case.keep
    key, value, index = reference.compress(case.key, case.value, *arguments, budget="head", **case.scoring)
    rows = formulas.output_length(case.tokens, *arguments)
    compressed = formulas.compressed_count(case.tokens, case.sink, case.lag_size)
    assert index.shape[2] == key.shape[2] == value.shape[2] == rows
    assert (index[..., 1:] > index[..., :-1]).all()
    last = case.tokens - case.sink - compressed * case.lag_size if compressed else case.tokens - case.sink
    position = torch.arange(case.tokens, dtype=torch.int32)
    edge = min(case.sink, case.tokens)
    assert (index[..., :edge] == position[:edge]).all()
    if last > 0:
        assert (index[..., rows - last :] == position[case.tokens - last :]).all()
    assert equal(key, reference.compact(case.key, index))
    assert equal(value, reference.compact(case.value, index))


@given(cases())
def test_one_scored_partition_has_the_partitions_budget(case):
    """With nothing carried and a single partition to choose from, both budgets are the same choice."""
    tokens = case.sink + 2 * case.lag_size
    key, value = case.key[:, :, :tokens], case.value[:, :, :tokens]
    arguments = case.sink, case.lag_size, case.keep
    head, partition = (
        reference.compress(key, value, *arguments, budget=budget, **case.scoring)[2]
        for budget in ("head", "partition")
    )
    assert torch.equal(head, partition)


@given(cases())
def test_nothing_left_out_scores_higher_and_ties_go_to_the_lower_row(case):
    scores = reference.lag_score(case.key, case.value, case.sink, case.lag_size, **case.scoring)
    index, carried = reference.head_index(
        scores, torch.empty(*scores.shape[:2], 0, dtype=scores.dtype), case.sink, case.keep, case.tokens
    )
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            flat = scores[b, h].flatten().tolist()
            order = sorted(range(len(flat)), key=lambda i, flat=flat: (-rank(flat[i]), i))
            wanted = sorted(order[: case.keep * scores.shape[2]])
            first = min(case.sink, case.tokens)
            kept = (index[b, h, first : first + len(wanted)] - case.sink).tolist()
            assert kept == wanted
            assert equal(carried[b, h], torch.tensor([flat[i] for i in wanted], dtype=scores.dtype))


@given(cases(), st.lists(st.integers(0, 70), max_size=5))
def test_carried_scores_in_chunks(case, cuts):
    """Scores are those of one reading; every compression drops the lowest; the best of all are never lost."""
    stream = Stream(case)
    edges = sorted({0, case.tokens, *(c for c in cuts if c < case.tokens)})
    for begin, end in itertools.pairwise(edges):
        stream.read(begin, end)
    compressed = formulas.compressed_count(case.tokens, case.sink, case.lag_size)
    assert stream.seen.shape[2] == formulas.output_length(case.tokens, case.sink, case.lag_size, case.keep)
    assert stream.start == case.sink + case.keep * compressed
    assert all(out <= stay for out, stay in stream.dropped)
    whole = reference.lag_score(case.key, case.value, case.sink, case.lag_size, **case.scoring).flatten(2)
    middle = stream.seen[:, :, case.sink : stream.start] - case.sink
    assert equal(stream.carried, whole.gather(2, middle))  # final: chunks change no score
    assert (middle[..., 1:] > middle[..., :-1]).all()
    for b in range(whole.shape[0]):
        for h in range(whole.shape[1]):
            flat, kept = whole[b, h].tolist(), set(middle[b, h].tolist())
            order = sorted(range(len(flat)), key=lambda i, flat=flat: (-rank(flat[i]), i))
            assert set(order[: case.keep if compressed else 0]) <= kept


@given(cases())
def test_one_chunk_is_one_shot(case):
    stream = Stream(case)
    stream.read(0, case.tokens)
    arguments = case.sink, case.lag_size, case.keep
    index = reference.compress(case.key, case.value, *arguments, budget="head", **case.scoring)[2]
    assert torch.equal(stream.seen, index.long())


def test_a_partition_that_cannot_be_judged_is_kept_before_all_others():
    key, value = torch.randn(2, 1, 1, 20, 4, generator=torch.Generator().manual_seed(0))
    key[0, 0, 5, 2] = torch.nan  # the partitions are 0..3, 4..7, ...: 4..7 and, by its reference, 0..3
    index = reference.compress(key, value, 0, 4, 2, score="blend", smooth=3, budget="head")[2]
    assert index.flatten().tolist() == [*range(8), *range(16, 20)]


def test_signed_zeros_are_equal_and_carried_rows_stand_first():
    score = torch.tensor([[[[0.0, -0.0, 1.0, 0.0]]]])
    index, carried = reference.head_index(score, torch.tensor([[[-0.0, 2.0]]]), 3, 1, 11)
    # Three places: 2.0, 1.0, and of the zeros the carried one.
    assert index.flatten().tolist() == [0, 1, 2, 5, 7, 8, 9, 10]
    assert carried.flatten().tolist() == [0.0, 2.0, 1.0]


def test_defaults_are_the_papers():
    key, value = torch.randn(2, 1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    plain = reference.compress(key, value, 3, 8, 2)
    named = reference.compress(key, value, 3, 8, 2, score="std", smooth=1, budget="partition")
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))
