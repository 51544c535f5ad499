"""`compress_blocks` on every backend: rows as `compress` keeps them, in blocks of their own; nothing else touched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

from tests.ops.blocks_cases import AMX_KEYS, AMX_VALUES, HND, VEC, BlocksCase, PoolLayout, blocks_cases
from tests.ops.blocks_properties import check_blocks
from tests.ops.cases import KINDS


@given(case=blocks_cases())
def test_blocks(backend, case):
    check_blocks(backend, case)


@given(case=blocks_cases(kinds=("normal", "offset", "ties")))
def test_blocks_of_plain_values(backend, case):
    check_blocks(backend, case)


BASE = BlocksCase(
    ((0, 2), (3, 3), (1, 4), (2, 3)),
    heads=2,
    key_dim=32,
    value_dim=32,
    sink=20,
    lag_size=16,
    keep=8,
    block_size=8,
    dtype=torch.bfloat16,
    spare=2,
    seed=1,
)
TRAPS = {
    "plain": BASE,
    "cosine": dataclasses.replace(BASE, score="cosine"),
    "keep-all": dataclasses.replace(BASE, keep=16),
    "sink-of-whole-blocks": dataclasses.replace(BASE, sink=16),
    "sink-shorter-than-a-block": dataclasses.replace(BASE, sink=3),
    "no-sink": dataclasses.replace(BASE, sink=0),
    "block-of-one": dataclasses.replace(BASE, block_size=1),
    "block-is-a-partition": dataclasses.replace(BASE, block_size=16, keep=16),
    "nothing-to-do": dataclasses.replace(BASE, sequences=((0, 0), (5, 5))),
    "no-sequences": dataclasses.replace(BASE, sequences=()),
    "no-heads": dataclasses.replace(BASE, heads=0),
    "no-channels": dataclasses.replace(BASE, key_dim=0, value_dim=0),
    "no-channels-of-value": dataclasses.replace(BASE, value_dim=0),
    "one-channel": dataclasses.replace(BASE, key_dim=1, value_dim=2),
    "wide": dataclasses.replace(BASE, key_dim=300, value_dim=257, heads=1, dtype=torch.float32),
    "one-sequence-in-steps": dataclasses.replace(BASE, sequences=((0, 2), (2, 3), (3, 5)), shared=True),
    "blocks-in-order": dataclasses.replace(BASE, seed=3),
    "hnd": dataclasses.replace(BASE, key_layout=HND, value_layout=HND),
    "vec": dataclasses.replace(BASE, key_layout=VEC, value_layout=HND),
    "vec-float32": dataclasses.replace(BASE, key_layout=VEC, value_layout=HND, dtype=torch.float32, seed=3),
    "amx": dataclasses.replace(BASE, key_layout=AMX_KEYS, value_layout=AMX_VALUES),
    "values-of-one-channel-in-a-column": dataclasses.replace(BASE, value_dim=1, value_layout=VEC),
    "tiles-of-a-whole-row": dataclasses.replace(
        BASE, key_layout=PoolLayout(order=(2, 0, 1, 3, 4), split=(1, 32)), value_layout=VEC
    ),
    "one-long": dataclasses.replace(BASE, sequences=((0, 25), (0, 1), (7, 9))),
    "many-scores": dataclasses.replace(BASE, lag_size=304, keep=80, heads=1, key_dim=8, sequences=((0, 2), (1, 2))),
    "far": dataclasses.replace(BASE, sequences=((200, 202), (0, 1)), heads=1, key_dim=4, value_dim=4),
    "float64": dataclasses.replace(BASE, dtype=torch.float64, value_layout=VEC),
    **{f"kind-{kind}": dataclasses.replace(BASE, key_kind=kind, value_kind=kind) for kind in KINDS},
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(backend, trap):
    check_blocks(backend, TRAPS[trap])


# Enough for several threads: equal sequences, and one that is longer than all others.
LARGE = {
    "equal": dataclasses.replace(
        BASE, sequences=((1, 6),) * 4, key_dim=64, value_dim=64, lag_size=64, block_size=16, keep=16
    ),
    "one-long": dataclasses.replace(
        BASE, sequences=((0, 40), (2, 3)), heads=1, key_dim=128, value_dim=96, lag_size=64, key_layout=VEC
    ),
}


@pytest.mark.parametrize("shape", LARGE)
def test_threads_do_not_matter(kernel_backend, shape):
    case = LARGE[shape]
    if kernel_backend.is_slow:
        case = dataclasses.replace(case, sequences=tuple((m // 4, n // 4 + 1) for m, n in case.sequences))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3) if kernel_backend.is_slow else (1, 2, 3, 7):
            torch.set_num_threads(count)
            check_blocks(kernel_backend, case)
    finally:
        torch.set_num_threads(threads)
