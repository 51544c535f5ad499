"""A few large shapes on every backend: many threads, split runs, tiles beyond the cache, and every fast path.

Whole-tensor comparison, so the tolerance has no floor: twice plain PyTorch's worst error and no more.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.cases import Case, Layout
from tests.ops.compare import FACTOR, assert_bits, assert_scores, assert_selection
from tests.ops.properties import band_of, rows

BNHD = Layout(order=(0, 2, 1))
SLOTS = Layout(spare=(0, 0, 100))

SHAPES = {
    "llama": Case(1, 8, 16 + 3072, 128, 128, 16, 128, 32, torch.bfloat16, "offset", "normal", BNHD, BNHD),
    "llama-f32": Case(
        1, 8, 16 + 2048, 128, 128, 16, 128, 32, torch.float32, "offset", "normal", SLOTS, SLOTS
    ),
    "long-partitions": Case(
        1, 2, 4 + 6 * 1024 + 77, 64, 64, 4, 1024, 170, torch.float16, "offset", "outliers"
    ),
    "one-head": Case(1, 1, 16 + 150 * 64, 64, 64, 16, 64, 8, torch.float16),
    "many-heads": Case(5, 13, 3 + 9 * 33, 40, 24, 3, 33, 11, torch.bfloat16),
    "longest-partition": Case(1, 1, 5 + 2 * 65536 + 9, 4, 3, 5, 65536, 20000, torch.float32),
    "wide": Case(1, 2, 3 + 5 * 128, 576, 512, 3, 128, 16, torch.bfloat16, "offset"),
    "wider": Case(1, 1, 2 + 4 * 32, 1030, 2048, 2, 32, 5, torch.float32),
    "float64": Case(1, 3, 16 + 1024, 96, 96, 16, 128, 32, torch.float64, "offset"),
}
FAST_DIMS = (64, 80, 96, 128, 192, 256)


def scaled(case: Case, backend) -> Case:
    """Thread-by-thread execution gets an eighth of the tokens, and shorter partitions."""
    if not backend.is_slow:
        return case
    lag_size = min(case.lag_size, 2048)
    count = max(2, min((case.length - case.start) // case.lag_size, 16384 // lag_size) // 8 + 2)
    return dataclasses.replace(
        case,
        heads=min(case.heads, 3),
        batch=min(case.batch, 2),
        lag_size=lag_size,
        length=case.start + count * lag_size + min(9, lag_size - 1),
        keep=max(1, case.keep * lag_size // case.lag_size),
    )


def check_large(backend, case: Case) -> None:
    """Scores, selection and rows at once: the reference in float64 is computed once."""
    key, value = (placed.view for placed in case.make(backend.device))
    band = band_of(case)
    scores = backend.lag_score(key, value, case.start, case.lag_size, **case.scoring)
    assert_scores(scores, band)
    error = (scores.cpu().double() - band.exact).abs().max()
    if (
        case.dtype != torch.float64
    ):  # where the yardstick is in the same precision, the band above is all there is
        assert error <= FACTOR * band.plain_error.max(), (
            f"off by {error:.3g}, plain PyTorch by {band.plain_error.max():.3g}"
        )
    expected = backend.compress(key, value, case.start, case.lag_size, case.keep, **case.scoring)
    assert_selection(expected[2], band, case.length, case.start, case.lag_size, case.keep)
    assert_bits(expected[0], rows(key, expected[2]), "key")
    assert_bits(expected[1], rows(value, expected[2]), "value")
    index = backend.compress_(key, value, case.start, case.lag_size, case.keep, **case.scoring)
    assert_bits(index, expected[2], "index in place")
    assert_bits(key[:, :, : index.shape[2]], expected[0], "key in place")
    assert_bits(value[:, :, : index.shape[2]], expected[1], "value in place")


@pytest.mark.parametrize("score", ["std", "cosine"])
@pytest.mark.parametrize("shape", SHAPES)
def test_large(backend, shape, score):
    check_large(backend, scaled(dataclasses.replace(SHAPES[shape], score=score), backend))


@pytest.mark.parametrize("score", ["std", "cosine"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("dim", FAST_DIMS)
def test_fast_dimension(backend, dim, dtype, score):
    other = FAST_DIMS[FAST_DIMS.index(dim) - 1]
    check_large(
        backend,
        scaled(Case(1, 2, 7 + 5 * 64 + 5, dim, other, 7, 64, 16, dtype, "offset", score=score), backend),
    )


def test_threads_do_not_matter_at_size(kernel_backend):
    """Run splitting depends on the shape and on the machine; what comes out does not."""
    for name in ("llama", "one-head", "long-partitions"):
        case = scaled(SHAPES[name], kernel_backend)
        key, value = (placed.view for placed in case.make(kernel_backend.device))
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 5, 16):
                torch.set_num_threads(count)
                results.append(kernel_backend.compress(key, value, case.start, case.lag_size, case.keep))
                scores = kernel_backend.lag_score(key, value, case.start, case.lag_size)
                results[-1] = (*results[-1], scores)
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            for what, actual, first in zip(
                ("key", "value", "index", "score"), result, results[0], strict=True
            ):
                assert_bits(actual, first, what)
