"""The properties of the ragged operators find faults: the reference with one fault planted fails at least one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lagkv_ext import reference
from tests.ops.backends import Backend
from tests.ops.ragged_properties import CHECKS
from tests.ops.test_mutants import Careless, mutant
from tests.ops.test_ragged_properties import TRAPS

# Name of the fault: text of reference.py, and what replaces it.
FAULTS = {
    "slots: length ignored": ("value[b : b + 1, :, :tokens]", "value[b : b + 1]"),
    "slots: row past the length": ("key[b : b + 1, :, :tokens]", "key[b : b + 1, :, : tokens - 1]"),
    "packed: start of the first sequence": ("sequence, int(start[b])", "sequence, int(start[0])"),
    "start of the first sequence": ("first = int(start[b])", "first = int(start[0])"),
    "start not updated": ("start[b], length[b] = new_start, rows", "length[b] = rows"),
    "length not updated": ("start[b], length[b] = new_start, rows", "start[b] = new_start"),
    "start is the sink for ever": ("formulas.next_start(tokens, first, lag_size, keep)", "first"),
    "index not padded": ("key.new_full(key.shape[:3], -1,", "key.new_full(key.shape[:3], 0,"),
    "packed: offset of the input": (
        "new_cu_seqlens[b + 1] = new_cu_seqlens[b] + one[2].shape[2]",
        "new_cu_seqlens[b + 1] = cu_seqlens[b + 1]",
    ),
    "packed: the caller's start is written": ("cu_seqlens.clone(), start.clone()", "cu_seqlens.clone(), start"),
    "packed: index of the row and not of the position": (
        "results.append(result[0])",
        "results.append(result[0] if result[0].is_floating_point() else result[0] + cu_seqlens[b])",
    ),
    "pages: table of the first sequence": ("block_table[b, position //", "block_table[0, position //"),
    "pages: one row of a page unused": (
        "position % block_size",
        "(position + 1) % block_size",
    ),
    "pages: keys alone are moved": (
        "value_cache[block[moved], row[moved]] = new_value[0, :, moved].transpose(0, 1)",
        "pass",
    ),
    "pages: the last row is not moved": (
        "position[(first if scores is None else sink) : rows]",
        "position[first : rows - 1]",
    ),
    "pages: written past the length": (
        "    capacity = block_table.shape[1] * block_size",
        "    for b, n in enumerate(length.tolist()):\n"
        "        if n:\n"
        "            key_cache[block_table[b, (n - 1) // block_size], (n - 1) % block_size + 1 :] = 0\n"
        "    capacity = block_table.shape[1] * block_size",
    ),
}  # fmt: skip


def find_fault(backend: Backend) -> None:
    for case in TRAPS.values():
        for check in CHECKS:
            check(backend, dataclasses.replace(case, dtype=torch.float32))


def test_the_reference_has_none():
    find_fault(Backend("reference", reference))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    with pytest.raises((AssertionError, RuntimeError)):
        find_fault(mutant(*FAULTS[fault]))


class WritesAnUnusedPage(Careless):
    def compress_paged_(self, key_cache, *arguments, **scoring):
        index = reference.compress_paged_(key_cache, *arguments, **scoring)
        unused = set(range(key_cache.shape[0])) - set(arguments[1].flatten().tolist())
        for block in unused:
            key_cache[block] = 0
        return index


class WritesTheTable(Careless):
    def compress_paged_(self, key_cache, value_cache, block_table, *arguments, **scoring):
        index = reference.compress_paged_(key_cache, value_cache, block_table, *arguments, **scoring)
        block_table[:, -1:] = -1
        return index


class ReadsPastTheLength(Careless):
    def compress_ragged_(self, key, value, start, length, *arguments, **scoring):
        key.nan_to_num_()
        return reference.compress_ragged_(key, value, start, length, *arguments, **scoring)


class WritesTheInputOfPackedRows(Careless):
    def compress_varlen(self, key, *arguments, **scoring):
        result = reference.compress_varlen(key, *arguments, **scoring)
        key[-1:] = 0
        return result


@pytest.mark.parametrize(
    "kind",
    [WritesAnUnusedPage, WritesTheTable, ReadsPastTheLength, WritesTheInputOfPackedRows],
    ids=lambda kind: kind.__name__,
)
def test_careless_memory_is_found(kind):
    with pytest.raises(AssertionError):
        find_fault(Backend("reference", kind()))
