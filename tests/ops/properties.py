"""Properties of every backend on every case, as functions: Hypothesis calls them, and so do the planted faults."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lagkv_ext import reference
from tests.ops.backends import Backend
from tests.ops.cases import Case, Placed, bits
from tests.ops.compare import Band, assert_bits, assert_scores, assert_selection, kept_mask, score_band


@contextmanager
def untouched(*placed: Placed) -> Iterator[None]:
    """The storages, guards included, hold the same bits after the block as before."""
    before = [p.storage.clone() for p in placed]
    yield
    for p, old in zip(placed, before, strict=True):
        assert_bits(p.storage, old, "an input")


def check_partition_bounds(backend: Backend, case: Case) -> None:
    """Minimum and maximum are exact, NaN where a NaN is."""
    for placed in case.make(backend.device):
        with untouched(placed):
            actual = backend.partition_bounds(placed.view, case.start, case.lag_size)
        assert actual.device == placed.view.device
        expected = reference.partition_bounds(placed.view.cpu(), case.start, case.lag_size)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def check_lag_score(backend: Backend, case: Case) -> None:
    key, value = case.make(backend.device)
    with untouched(key, value):
        actual = backend.lag_score(key.view, value.view, case.start, case.lag_size, **case.scoring)
    assert actual.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert actual.device == key.view.device
    assert_scores(actual, band_of(case))


def check_topk_index(backend: Backend, score: Tensor, keep: int) -> None:
    """Exact: the scores are given."""
    before = score.clone()
    actual = backend.topk_index(score, keep)
    assert_bits(score, before, "score")
    # On the CPU: a sort on the device may tell -0 from 0.
    assert_bits(actual, reference.topk_index(score.cpu(), keep).to(score.device), "index")


def check_compact(backend: Backend, placed: Placed, index: Tensor) -> None:
    before = index.clone()
    with untouched(placed):
        actual = backend.compact(placed.view, index)
    assert_bits(index, before, "index")
    expected = bits(placed.view).gather(
        2, index.long().unsqueeze(-1).expand(*index.shape, placed.view.shape[3])
    )
    assert_bits(actual, expected.view(placed.view.dtype), "compact")


def check_compress(backend: Backend, case: Case) -> None:
    """Shapes, selection, and rows copied bit for bit; the inputs stay as they are."""
    key, value = case.make(backend.device)
    with untouched(key, value):
        new_key, new_value, index = backend.compress(
            key.view, value.view, case.start, case.lag_size, case.keep, **case.method
        )
    assert_selection(index, band_of(case), case.length, case.start, case.lag_size, case.keep)
    assert_ties(key.view, value.view, index, case)
    assert_bits(new_key, rows(key.view, index), "key")
    assert_bits(new_value, rows(value.view, index), "value")
    for output in (new_key, new_value, index):
        assert output.is_contiguous(), "an output is not contiguous"


def check_staged(backend: Backend, case: Case) -> None:
    """compress is compact of topk_index of lag_score, with prefix and window, bit for bit on the same backend."""
    key, value = (placed.view for placed in case.make(backend.device))
    new_key, new_value, index = backend.compress(
        key, value, case.start, case.lag_size, case.keep, **case.method
    )
    scores = backend.lag_score(key, value, case.start, case.lag_size, **case.scoring)
    if case.budget == "head":
        staged = reference.head_index(
            scores, scores.flatten(2)[:, :, :0], case.start, case.keep, case.length
        )[0]
    else:
        staged = whole_index(backend.topk_index(scores, case.keep), case)
    assert_bits(index, staged, "index")
    assert_bits(new_key, backend.compact(key, staged), "key")
    assert_bits(new_value, backend.compact(value, staged), "value")


def check_in_place(backend: Backend, case: Case) -> None:
    """compress_ leaves what compress returns in the first rows, and writes nothing outside the tensors."""
    key, value = case.make(backend.device)
    expected = backend.compress(key.view, value.view, case.start, case.lag_size, case.keep, **case.method)
    outside = [placed.storage[placed.outside()] for placed in (key, value)]
    index = backend.compress_(key.view, value.view, case.start, case.lag_size, case.keep, **case.method)
    assert_bits(index, expected[2], "index")
    for placed, rows_expected, name, old in zip(
        (key, value), expected, ("key", "value"), outside, strict=False
    ):
        assert_bits(placed.view[:, :, : rows_expected.shape[2]], rows_expected, name)
        assert_bits(placed.storage[placed.outside()], old, f"memory around {name}")
        if not case.compressed:
            assert placed.view.shape[2] == rows_expected.shape[2]


def check_repeatable(backend: Backend, case: Case) -> None:
    """The same bits for every number of threads, and at every run."""
    key, value = (placed.view for placed in case.make(backend.device))

    def run() -> tuple[Tensor, ...]:
        arguments = (key, value, case.start, case.lag_size)
        scores = backend.lag_score(*arguments, **case.scoring)
        return (
            *backend.compress(*arguments, case.keep, **case.method),
            scores,
            backend.topk_index(scores, case.keep),
        )

    expected = run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for name, actual, first in zip(
                ("key", "value", "index", "score", "topk"), run(), expected, strict=True
            ):
                assert_bits(actual, first, f"{name} with {count} threads")
    finally:
        torch.set_num_threads(threads)


CASE_CHECKS = (
    check_partition_bounds,
    check_lag_score,
    check_compress,
    check_staged,
    check_in_place,
)


@functools.lru_cache(maxsize=512)
def band_of(case: Case) -> Band:
    """The scores a correct backend may return, computed on the CPU, once for all backends."""
    key, value = (placed.view for placed in case.make())
    return score_band(key, value, case.start, case.lag_size, case.value_weight, case.score, case.smooth)


def assert_ties(key: Tensor, value: Tensor, index: Tensor, case: Case) -> None:
    """Tokens at lower positions were kept among those of one partition with the same key and value."""
    kept = kept_mask(index, case.length, case.start, case.lag_size, case.keep)
    if not kept.numel():
        return
    # A wrapping sum of products tells rows apart but for chance.
    generator = torch.Generator().manual_seed(0)
    name = torch.zeros(case.batch, case.heads, case.length, dtype=torch.int64)
    for x in (key, value):
        odd = torch.randint(-(2**62), 2**62, (x.shape[3],), generator=generator) * 2 + 1
        mixed = bits(x).cpu().long() * 0x9E3779B97F4A7C1  # small floats differ in their highest bits alone
        name += ((mixed ^ (mixed >> 32)) * odd).sum(dim=-1)
    name = name[:, :, case.start : case.window].unflatten(2, (case.compressed, case.lag_size))
    same = (name.unsqueeze(-1) == name.unsqueeze(-2)).tril(-1)  # [.., u, t]: t < u
    bad = kept & (same & ~kept.unsqueeze(-2)).any(dim=-1)
    assert not bad.any(), f"{tuple(bad.nonzero()[0].tolist())} was kept and not its twin at a lower position"


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather by index, in integers, so that no bit can change."""
    gathered = bits(x).gather(2, index.long().unsqueeze(-1).expand(*index.shape, x.shape[3]))
    return gathered.view(x.dtype)


def whole_index(kept: Tensor, case: Case) -> Tensor:
    """Positions of the output rows from the kept positions ``[B, H, P-1, k]`` of every partition."""
    batch, heads, count, keep = kept.shape
    partition = case.start + case.lag_size * torch.arange(count, device=kept.device, dtype=torch.int32)
    inner = (kept + partition[:, None]).reshape(batch, heads, count * keep)
    first = case.start if count else 0
    prefix = torch.arange(first, device=kept.device, dtype=torch.int32).expand(batch, heads, -1)
    window = torch.arange(case.window, case.length, device=kept.device, dtype=torch.int32).expand(
        batch, heads, -1
    )
    return torch.cat([prefix, inner, window], dim=2)
