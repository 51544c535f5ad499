"""The compressions of a step, from the two block tables of its sequences."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from lagkv_ext.vllm import compress
from lagkv_ext.vllm.plan import crossings
from lagkv_ext.vllm.settings import parse

SETTINGS = parse({"lag_size": 8, "keep": 4, "sink_size": 3, "boundary": 16, "smooth": 3})
BLOCK = 4


def pools() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 24, BLOCK, 2, 8, generator=generator)
    return key, value


def work(raw: torch.Tensor, compressed: torch.Tensor) -> compress.Work:
    """Of sequences that all compute their first 32 tokens in a step."""
    plan = SETTINGS.plan(BLOCK)
    begins = torch.zeros(len(raw), dtype=torch.long)
    return compress.work(plan, SETTINGS, raw, compressed, *crossings(plan, begins, begins + 32))


@pytest.mark.parametrize("real", [False, True])
def test_dummy_runs_compress_nothing(real):
    """Their tables hold null blocks alone, with or without sequences of a real step beside them."""
    raw, compressed = torch.zeros(2, 3, 12, dtype=torch.int32)
    if real:
        raw[1, :8] = torch.arange(1, 9)
        compressed[1, :3] = torch.arange(9, 12)
    found, expected = pools(), pools()
    work(raw, compressed).run(*found)
    if real:
        work(raw[1:2], compressed[1:2]).run(*expected)
        assert any(not torch.equal(x, old) for x, old in zip(found, pools(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_null_block_is_vllms():
    assert compress.NULL_BLOCK == NULL_BLOCK_ID
