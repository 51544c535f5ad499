"""The property of `compress_blocks` finds faults: the reference with one fault planted fails it."""

# ruff: noqa: E501  (tables: one fault a line)

from __future__ import annotations

import dataclasses

import pytest
import torch

from lagkv_ext import reference
from tests.ops.backends import Backend
from tests.ops.blocks_properties import check_blocks
from tests.ops.test_blocks_properties import TRAPS
from tests.ops.test_mutants import Careless, mutant

# Name of the fault: text of reference.py, and what replaces it.
FAULTS = {
    "tables of the first sequence": ("block_rows(x, source_table[b], token)", "block_rows(x, source_table[0], token)"),
    "partitions from the first on": ("for m in (before, after))", "for m in (0, after - before))"),
    "the partition behind is compressed": ("read = [*range(sink_size - part, sink_size), *range(first,", "window += lag_size\n        read = [*range(sink_size - part, sink_size), *range(first,"),
    "kept rows of the first partition": ("begin[:, None]", "begin[:1, None]"),
    "no mixed block": ("[*range(part), *behind]", "[]"),
    "mixed block without the sink": ("[*range(part), *behind]", "[*behind]"),
    "mixed block without the rows behind": ("[*range(part), *behind]", "[*range(part)]"),
    "a mixed block for every sink": ("if part else 0)", ")"),
    "values are not written": ("((key_cache, key), (value_cache, value))", "((key_cache, key),)"),
    "index from 0 on": ("= token[rows[0]]", "= rows[0]"),
    "sequences that compress nothing": ("        if after == before:\n            continue\n", ""),
    "target of the first sequence": ("write_block_rows(pool, target_table[b]", "write_block_rows(pool, target_table[0]"),
}  # fmt: skip


def find_fault(backend: Backend) -> None:
    for case in TRAPS.values():
        check_blocks(backend, dataclasses.replace(case, dtype=torch.float32))


def test_the_reference_has_none():
    find_fault(Backend("reference", reference))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        find_fault(mutant(*FAULTS[fault]))


class ReadsAHole(Careless):
    def compress_blocks(self, key_cache, *arguments, **scoring):
        result = reference.compress_blocks(key_cache, *arguments, **scoring)
        key_cache.nan_to_num_()
        return result


class WritesTheTable(Careless):
    def compress_blocks(self, key_cache, value_cache, source, target, *arguments, **scoring):
        result = reference.compress_blocks(key_cache, value_cache, source, target, *arguments, **scoring)
        target[:, -1:] = -1
        return result


@pytest.mark.parametrize("kind", [ReadsAHole, WritesTheTable], ids=lambda kind: kind.__name__)
def test_careless_memory_is_found(kind):
    with pytest.raises(AssertionError):
        find_fault(Backend("reference", kind()))
