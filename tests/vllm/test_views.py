"""Views of a backend's blocks as rows, against the kernels of vLLM that write them."""

from __future__ import annotations

import pytest
import torch
import vllm._C  # noqa: F401  the CPU's kernels
from hypothesis import given
from hypothesis import strategies as st
from vllm import _custom_ops

from lagkv_ext import reference
from lagkv_ext.vllm.backend import side_by_side
from lagkv_ext.vllm.cpu_attn import LAYOUTS, LagKVCPUAttentionImpl


class Layer:
    def __init__(self, isa: str) -> None:
        self.isa = isa


def written_by_vllm(isa: str, dtype: torch.dtype, blocks: int, heads: int, rows: int, channels: int):
    """A cache in which every slot was written by vLLM, and the keys and values ``[slots, H, D]``."""
    cache = torch.zeros(blocks, heads, rows, 2 * channels, dtype=dtype)
    key_cache, value_cache = cache.view(blocks, heads, 2 * rows, channels).chunk(2, dim=2)
    key, value = (torch.randn(blocks * rows, heads, channels).to(dtype) for _ in range(2))
    slots = torch.randperm(blocks * rows)
    _custom_ops.cpu_attn_reshape_and_cache(
        key[slots],
        value[slots],
        key_cache,
        value_cache,
        slots,
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return cache, key, value


@pytest.mark.parametrize(
    ("isa", "dtype", "channels"),
    [
        ("vec", torch.float32, 64),
        ("vec", torch.bfloat16, 128),
        ("vec16", torch.float32, 80),
        ("amx", torch.bfloat16, 64),
        ("amx", torch.bfloat16, 128),
    ],
)
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([32, 64]))
def test_cpu_layouts_are_read_and_written_where_vllm_does(isa, dtype, channels, seed, rows):
    torch.manual_seed(seed)
    cache, key, value = written_by_vllm(isa, dtype, 3, 2, rows, channels)
    pools = LagKVCPUAttentionImpl.pools(None, Layer(isa), cache)  # type: ignore[arg-type]
    table = torch.randperm(3)
    tokens = torch.randperm(3 * rows)[:40]
    slots = table[tokens // rows] * rows + tokens % rows
    for pool, expected in zip(pools, (key, value), strict=True):
        assert torch.equal(reference.block_rows(pool, table, tokens)[0], expected[slots].transpose(0, 1))
    new = torch.randn(2, 40, channels).to(dtype)
    first = torch.arange(40)
    for pool, other in (pools, pools[::-1]):
        kept = reference.block_rows(other, table, tokens)
        reference.write_block_rows(pool, table, new)
        assert torch.equal(reference.block_rows(pool, table, first)[0], new)
        assert torch.equal(reference.block_rows(other, table, tokens), kept)


@pytest.mark.parametrize(
    ("isa", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)]
)
def test_the_operator_compresses_in_the_layouts_of_the_cpu(isa, dtype):
    torch.manual_seed(0)
    cache, _, _ = written_by_vllm(isa, dtype, 20, 2, 32, 64)
    copy = cache.clone()
    tables = torch.randperm(20).int()[None].split(14, dim=1)
    numbers = torch.tensor([0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    index = [
        function(*LagKVCPUAttentionImpl.pools(None, Layer(isa), x), *tables, *numbers, 16, 128, 64)  # type: ignore[arg-type]
        for function, x in ((torch.ops.lagkv.compress_blocks, cache), (reference.compress_blocks, copy))
    ]
    assert torch.equal(*index)
    assert torch.equal(cache, copy)


def test_every_layout_is_tested():
    assert set(LAYOUTS) == {"vec", "vec16", "amx"}


def test_gpu_layouts_are_split_as_their_backends_split_them():
    cache = torch.randn(3, 2, 16, 96 + 64)
    keys, values = side_by_side(cache, 96)
    stock_key, stock_value = cache.transpose(1, 2).split([96, 64], dim=-1)
    assert torch.equal(keys, stock_key)
    assert torch.equal(values, stock_value)
