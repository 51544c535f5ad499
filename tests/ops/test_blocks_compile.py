"""`compress_blocks` in compiled graphs: numbers of partitions live on the device and change without recompilation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import lagkv_ext
from tests.ops.blocks_cases import AMX_KEYS, AMX_VALUES, HND, VEC
from tests.ops.test_blocks_properties import BASE
from tests.ops.test_compile import _fresh_compiler, assert_same, compilations, compiled

__all__ = ["_fresh_compiler"]  # a fixture that every test here uses
CASE = dataclasses.replace(BASE, dtype=torch.float32)
LAYOUTS = {"hnd": (HND, HND), "vec": (VEC, HND), "amx": (AMX_KEYS, AMX_VALUES)}


def step(key: Tensor, value: Tensor, source: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    index = lagkv_ext.compress_blocks(
        key, value, source, target, *numbers, sink_size=CASE.sink, lag_size=CASE.lag_size, keep=CASE.keep
    )
    return index, (index >= 0).sum(dim=2), torch.where(index[:, 0] >= 0, index[:, 0], -2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_for_all_numbers(compiler, layout):
    key_layout, value_layout = LAYOUTS[layout]
    function = compiled(step, compiler)
    for seed, sequences in enumerate(
        (((0, 2), (1, 1)), ((3, 5), (0, 1)), ((1, 4), (2, 3)), ((0, 0), (4, 4)))
    ):
        case = dataclasses.replace(
            CASE, sequences=sequences, key_layout=key_layout, value_layout=value_layout, seed=seed
        )
        states = []
        for _ in range(2):
            key, value, source, target = case.pools(case.make())
            states.append((key.view, value.view, source.contiguous(), target.contiguous(), *case.numbers()))
        assert_same(function(*states[0]), step(*states[1]))
        for mine, eager in zip(*states, strict=True):
            torch.testing.assert_close(mine, eager, rtol=0, atol=0, equal_nan=True)
    assert compilations() <= 3  # tables of another width


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_keys_and_values_in_one_pool(compiler):
    """Both are written, and both are views of one tensor."""

    def of_pool(kv: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        rows = kv.transpose(1, 2)
        index = step(rows[..., : CASE.key_dim], rows[..., CASE.key_dim :], *tables)[0]
        return index, kv.nan_to_num().amax(dim=(1, 2, 3))

    key, value, *tables = CASE.pools(CASE.make())
    pool = torch.cat([key.view, value.view], dim=3).transpose(1, 2).contiguous()
    states = [(pool.clone(), *(x.contiguous() for x in tables), *CASE.numbers()) for _ in range(2)]
    assert_same(torch.compile(of_pool, fullgraph=True, backend=compiler)(*states[0]), of_pool(*states[1]))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=0, equal_nan=True)
