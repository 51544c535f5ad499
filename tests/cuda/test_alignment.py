"""Rows that are nearly aligned: one stride, the address or one width is off, all else would allow 16-byte accesses.

A wide access to such a row is a fault on a device, and in the executor. Random layouts seldom have one thing off alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lagkv_ext import reference
from tests.ops.backends import Unavailable, make_simt
from tests.ops.compare import assert_bits, assert_scores, score_band

SHAPE = (2, 2, 3 * 4)  # batch, heads, tokens


@pytest.fixture(scope="module")
def executor():
    try:
        return make_simt()
    except Unavailable as reason:
        pytest.skip(str(reason))


def strided(dim: int, strides: tuple[int, int, int], offset: int = 0, seed: int = 0) -> Tensor:
    """float32 ``[2, 2, 12, dim]`` in rows of its own, at ``offset`` floats from an address that is aligned."""
    size = sum((n - 1) * stride for n, stride in zip(SHAPE, strides, strict=True)) + dim
    storage = torch.empty(size + offset + 4)
    assert storage.data_ptr() % 16 == 0
    x = storage.as_strided((*SHAPE, dim), (*strides, 1), offset)
    return x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))


ALIGNED = (96, 48, 4)
OFF = {
    "nothing": (4, ALIGNED, 0),
    "address": (4, ALIGNED, 1),
    "batches": (4, (97, 48, 4), 0),
    "heads": (4, (100, 49, 4), 0),
    "rows": (4, (120, 60, 5), 0),
    "width": (6, (192, 96, 8), 0),
}


@pytest.mark.parametrize("side", ["key", "value", "both"])
@pytest.mark.parametrize("off", OFF)
def test_one_thing_off(executor, off, side):
    dim, strides, offset = OFF[off]
    odd, other = strided(dim, strides, offset), strided(dim, strides, offset, seed=1)
    right = strided(4, ALIGNED, seed=2)
    check(executor, *{"key": (odd, right), "value": (right, odd), "both": (odd, other)}[side])


@pytest.mark.parametrize("dims", [(8, 6), (6, 8), (8, 5), (5, 8)])
def test_one_of_two_widths_off(executor, dims):
    """Both in rows of 8 floats, which are aligned; the row that is read is not as long."""
    check(executor, *(strided(dim, (192, 96, 8), seed=dim) for dim in dims))


def check(executor, key: Tensor, value: Tensor) -> None:
    for x in (key, value):
        assert torch.equal(executor.partition_bounds(x, 0, 4), reference.partition_bounds(x, 0, 4))
        index = torch.tensor([3, 1, 11], dtype=torch.int32).expand(2, 2, 3)
        assert torch.equal(executor.compact(x, index), reference.compact(x, index))
    for score in ("std", "cosine"):
        band = score_band(key, value, 0, 4, 1.0, score)
        assert_scores(executor.lag_score(key, value, 0, 4, score=score), band)
    expected = executor.compress(key, value, 0, 4, 1)
    for x, rows in zip((key, value), expected, strict=False):
        assert_bits(rows, reference.compact(x, expected[2]), "rows")
    start, length = (torch.full((2,), n, dtype=torch.int32) for n in (0, SHAPE[2]))
    for run in (
        lambda k, v: executor.compress_(k, v, 0, 4, 1),
        lambda k, v: executor.compress_ragged_(k, v, start, length, 4, 1)[:, :, : expected[2].shape[2]],
    ):
        mine = [copied(x) for x in (key, value)]
        assert_bits(run(*mine), expected[2], "index")
        for x, rows in zip(mine, expected, strict=False):
            assert_bits(x[:, :, : rows.shape[2]], rows, "rows in place")


def copied(x: Tensor) -> Tensor:
    """The same strides and offset in a storage of its own."""
    storage = torch.zeros(x.untyped_storage().nbytes() // 4)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
