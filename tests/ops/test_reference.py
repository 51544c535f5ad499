"""The reference itself, against loops over Python numbers that follow the specification word by word."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import reference
from tests.ops.cases import cases

SMALL = cases(kinds=("normal", "offset", "constant", "holes", "ties"), dtypes=(torch.float64,))


def softmax(s: list[float]) -> list[float]:
    top = max(s)
    e = [math.exp(x - top) for x in s]
    return [x / math.fsum(e) for x in e]


def std_scores(rows: list[list[float]], following: list[list[float]]) -> list[float]:
    """Steps 2 to 5 for one partition and the one after it."""
    channels = range(len(rows[0]))
    lo = [min(row[c] for row in following) for c in channels]
    hi = [max(row[c] for row in following) for c in channels]
    s = []
    for row in rows:
        y = [(row[c] - lo[c]) / (hi[c] - lo[c]) if hi[c] != lo[c] else 0.0 for c in channels]
        s.append(statistics.stdev(y) if len(y) > 1 else 0.0)
    return softmax(s)


def norm(row: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in row))


def cosine_scores(rows: list[list[float]], following: list[list[float]]) -> list[float]:
    """Section 2 for one partition and the one after it."""
    anchor = [0.0] * len(rows[0])
    for row in following:
        if norm(row) > 0:
            anchor = [a + x / norm(row) / len(following) for a, x in zip(anchor, row, strict=True)]
    s = []
    for row in rows:
        length = norm(row) * norm(anchor)
        s.append(-math.fsum(x * a for x, a in zip(row, anchor, strict=True)) / length if length > 0 else 0.0)
    deviation = statistics.stdev(s) if len(s) > 1 else 0.0
    mean = statistics.fmean(s)
    return [(x - mean) / deviation if deviation > 0 else 0.0 for x in s]


@given(case=SMALL)
def test_scores_are_the_loops(case):
    key, value = (placed.view for placed in case.make())
    one = {"std": std_scores, "cosine": cosine_scores}[case.score]
    actual = reference.lag_score(key, value, case.start, case.lag_size, **case.scoring)
    assert actual.shape == (case.batch, case.heads, case.compressed, case.lag_size)
    for b in range(case.batch):
        for h in range(min(case.heads, 2)):
            for p in range(case.compressed):
                first = case.start + p * case.lag_size
                tiles = [
                    (
                        x[b, h, first : first + case.lag_size].tolist(),
                        x[b, h, first + case.lag_size :][: case.lag_size].tolist(),
                    )
                    for x in (key, value)
                ]
                if case.score == "cosine" and any(nearly_parallel(*tile) for tile in tiles):
                    continue  # the deviation is nothing but rounding: no answer to compare
                expected = [
                    k + case.value_weight * v for k, v in zip(one(*tiles[0]), one(*tiles[1]), strict=True)
                ]
                torch.testing.assert_close(
                    actual[b, h, p], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9
                )


def nearly_parallel(rows: list[list[float]], following: list[list[float]]) -> bool:
    x, y = (torch.tensor(t, dtype=torch.float64) for t in (rows, following))
    unit = torch.nn.functional.normalize(y, dim=-1, eps=0).nan_to_num().mean(0)
    if unit.norm() < 1e-6 and y.any():  # directions that cancel, here to 0 and in another order nearly
        return True
    s = torch.nn.functional.normalize(x, dim=-1, eps=0).nan_to_num() @ (unit / unit.norm()).nan_to_num()
    return len(rows) > 1 and 0 < s.std() < 1e-6


@given(case=SMALL)
def test_bounds_are_the_loops(case):
    key, _ = (placed.view for placed in case.make())
    actual = reference.partition_bounds(key, case.start, case.lag_size)
    count = max(0, (case.length - case.start) // case.lag_size)
    assert actual.shape == (case.batch, case.heads, count, 2, case.key_dim)
    for b in range(case.batch):
        for h in range(case.heads):
            for p in range(count):
                rows = key[b, h, case.start + p * case.lag_size :][: case.lag_size].tolist()
                for c in range(case.key_dim):
                    column = [row[c] for row in rows]
                    assert actual[b, h, p, :, c].tolist() == [min(column), max(column)]


@given(
    score=st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]), st.floats(width=32)
        ),
        min_size=1,
    ),
    data=st.data(),
)
def test_topk_is_the_loop(score, data):
    keep = data.draw(st.integers(1, len(score)))
    left, expected = list(range(len(score))), []
    for _ in range(keep):
        best = left[0]
        for t in left[1:]:
            if score[t] > score[best] or (math.isnan(score[t]) and not math.isnan(score[best])):
                best = t
        expected.append(best)
        left.remove(best)
    assert reference.topk_index(torch.tensor(score), keep).tolist() == sorted(expected)


@given(case=cases(expanded=False))
def test_compress_is_the_seven_steps(case):
    """Step 6 and 7 by slices and loops; the scores are tested above."""
    key, value = (placed.view for placed in case.make())
    new_key, new_value, index = reference.compress(
        key, value, case.start, case.lag_size, case.keep, **case.scoring
    )
    scores = reference.lag_score(key, value, case.start, case.lag_size, **case.scoring)
    for b in range(case.batch):
        for h in range(case.heads):
            positions = list(range(min(case.start, case.length)))
            for p in range(case.compressed):
                first = case.start + p * case.lag_size
                positions += [first + t for t in reference.topk_index(scores[b, h, p], case.keep).tolist()]
            positions += range(len(positions) if not case.compressed else case.window, case.length)
            assert index[b, h].tolist() == positions
            for new, x in ((new_key, key), (new_value, value)):
                torch.testing.assert_close(new[b, h], x[b, h, positions], rtol=0, atol=0, equal_nan=True)


def test_readme_example_by_hand():
    """Two partitions of three tokens, one head, two channels, by hand."""
    key = torch.tensor(
        [[5.0, 5.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [9.0, 9.0]]
    )
    key = key.view(1, 1, 8, 2)
    # Bounds of rows 4..6 are 0 and 1 in both channels, so y = x and s = |x0 - x1| / sqrt 2: token 2 deviates most.
    assert reference.partition_bounds(key, 1, 3)[0, 0, 1].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    scores = reference.lag_score(key, key, 1, 3)
    expected = torch.softmax(torch.tensor([1.0, 3.0, 2.0]) / math.sqrt(2.0), 0) * 2
    torch.testing.assert_close(scores[0, 0, 0], expected)
    for keep, index in ((1, [0, 2, 4, 5, 6, 7]), (2, [0, 2, 3, 4, 5, 6, 7]), (3, list(range(8)))):
        assert reference.compress(key, key, 1, 3, keep)[2].tolist() == [[index]]


@pytest.mark.parametrize("score", ["std", "cosine"])
def test_undefined_directions_and_single_tokens(score):
    """Cases where the specification says 0: equal bounds, D = 1, L = 1, rows and anchors of norm 0."""
    zeros, ones = torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
    uniform = 2 / 4 if score == "std" else 0.0
    for x in (zeros, ones if score == "std" else zeros):
        assert (reference.lag_score(x, x, 0, 4, score=score) == uniform).all()
    single = torch.randn(1, 1, 8, 1)
    if score == "std":
        assert (reference.lag_score(single, single, 0, 4) == uniform).all()
    assert (
        reference.lag_score(torch.randn(1, 1, 8, 4), single, 0, 1, score=score)
        == (2.0 if score == "std" else 0.0)
    ).all()
