"""The ragged operators in compiled graphs: lengths live on the device and change without recompilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lagkv_ext
from tests.ops.ragged_cases import RaggedCase
from tests.ops.test_compile import _fresh_compiler, assert_same, compilations, compiled

__all__ = ["_fresh_compiler"]  # a fixture that every test here uses
SIZES = {"lag_size": 8, "keep": 2}
LENGTHS = ((40, 5), (0, 19), (20, 21), (36, 37), (64, 1), (18, 64))


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_step(key: Tensor, value: Tensor, start: Tensor, length: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    """Append one token to every slot, compress, and attend: everything a step needs, nothing on the host."""
    slot = torch.arange(key.shape[0], device=key.device)
    key[slot, :, length.long()] = new
    value[slot, :, length.long()] = new * 2
    length += 1
    index = lagkv_ext.compress_ragged_(key, value, start, length, **SIZES)
    seen = torch.arange(key.shape[2], device=key.device) < length[:, None]
    scores = (new.unsqueeze(2) @ key.transpose(2, 3)).masked_fill(~seen[:, None, None], -torch.inf)
    return index, scores.softmax(-1) @ torch.where(seen[:, None, :, None], value, 0)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_decoding_step_is_compiled_once(compiler):
    torch.manual_seed(0)
    states = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        key, value = (torch.randn(3, 2, 40, 8, generator=generator) for _ in range(2))
        states.append((key, value, numbers(2, 0, 2), numbers(0, 13, 30)))
    function = torch.compile(decode_step, fullgraph=True, backend=compiler)
    for _ in range(40):
        new = torch.randn(3, 2, 8)
        expected, actual = decode_step(*states[0], new), function(*states[1], new)
        torch.testing.assert_close(actual, expected)
        for b, tokens in enumerate(states[0][3].tolist()):
            for mine, eager in zip(states[1][:2], states[0][:2], strict=True):
                assert_same(mine[b, :, :tokens], eager[b, :, :tokens])
        assert_same(states[1][2:], states[0][2:])
    assert states[0][3].max() < 40
    assert states[0][2].min() > 2, "every sequence was compressed"
    assert compilations() == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_scores_in_a_compiled_step(compiler):
    """Scores in slots and in pages are written back to the caller's tensors."""

    def step(key: Tensor, value: Tensor, start: Tensor, length: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        before = scores + 0
        method = {**SIZES, "score": "blend", "smooth": 3, "budget": "head", "sink_size": 2}
        index = lagkv_ext.compress_ragged_(key, value, start, length, **method, scores=scores)
        return before, index, scores * 2

    function = torch.compile(step, fullgraph=True, backend=compiler)
    for lengths in LENGTHS:
        generator = torch.Generator().manual_seed(sum(lengths))
        key, value = (torch.randn(2, 2, 64, 8, generator=generator) for _ in range(2))
        scores = torch.randn(2, 2, 64, generator=generator)
        states = [
            (key.clone(), value.clone(), numbers(6, 3), numbers(*lengths), scores.clone()) for _ in "ab"
        ]
        assert_same(function(*states[0]), step(*states[1]))
        assert_same(states[0], states[1])
    assert compilations() == 1


def varlen_step(key: Tensor, value: Tensor, cu_seqlens: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    out = lagkv_ext.compress_varlen(key * 2, value, cu_seqlens, start, **SIZES)
    row = torch.arange(key.shape[0], device=key.device)
    valid = (row < out.cu_seqlens[-1])[:, None, None]
    return torch.where(valid, out.key + 1, 0), torch.where(valid, out.value, 0), *out[2:]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_packed_rows_of_any_number(compiler):
    """One graph for every length of every sequence, and for every number of rows and sequences."""
    function = compiled(varlen_step, compiler)
    for lengths in (*LENGTHS, (30, 0, 25), (1, 2, 40, 17)):
        total = sum(lengths) + 3
        key, value = torch.randn(total, 2, 8), torch.randn(total, 2, 9)
        ends = numbers(*(sum(lengths[:b]) for b in range(len(lengths) + 1)))
        arguments = key, value, ends, torch.full((len(lengths),), 2, dtype=torch.int32)
        assert_same(function(*arguments), varlen_step(*arguments))
    assert compilations() <= 2


def paged_step(
    key: Tensor, value: Tensor, table: Tensor, start: Tensor, length: Tensor
) -> tuple[Tensor, ...]:
    index = lagkv_ext.compress_paged_(key, value, table, start, length, **SIZES)
    blocks = (length + key.shape[1] - 1) // key.shape[1]
    return index, blocks, torch.where(torch.arange(table.shape[1]) < blocks[:, None], table, -1)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_pages_of_any_number(compiler):
    function = compiled(paged_step, compiler)
    for seed, lengths in enumerate((*LENGTHS, (30, 0, 25), (1, 2, 40, 17))):
        case = RaggedCase(
            tuple((2, n) for n in lengths), heads=2, key_dim=8, value_dim=9, block_size=4, spare=3, seed=seed
        )
        states = []
        for _ in range(2):
            key, value, table = case.pages(case.make())
            states.append((key.view, value.view, table.contiguous(), *case.numbers()))
        assert_same(function(*states[0]), paged_step(*states[1]))
        for mine, eager in zip(*states, strict=True):
            torch.testing.assert_close(mine, eager, rtol=0, atol=0, equal_nan=True)
    assert compilations() <= 2


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_keys_and_values_in_one_pool(compiler):
    """Both are written, and both are views of one tensor."""

    def step(kv: Tensor, table: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        index = lagkv_ext.compress_paged_(kv[0], kv[1], table, start, length, **SIZES)
        return index, kv.amax(dim=(1, 2, 3, 4))

    function = torch.compile(step, fullgraph=True, backend=compiler)
    for lengths in LENGTHS:
        kv = torch.randn(2, 40, 4, 2, 8)
        table = torch.randperm(40).int()[:34].view(2, 17)
        states = [(kv.clone(), table, numbers(2, 2), numbers(*lengths)) for _ in range(2)]
        assert_same(function(*states[0]), step(*states[1]))
        assert_same(states[0], states[1])
    assert compilations() == 1
