"""The ragged operators on every backend: each sequence as `compress` leaves it alone, and nothing else touched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

from tests.ops.cases import KINDS
from tests.ops.ragged_cases import HND, NHD, RaggedCase, ragged_cases
from tests.ops.ragged_properties import (
    CHECKS,
    assert_numbers,
    assert_sequence,
    check_packed,
    check_pages,
    check_slots,
)


@given(case=ragged_cases())
def test_slots(backend, case):
    check_slots(backend, case)


@given(case=ragged_cases())
def test_packed_rows(backend, case):
    check_packed(backend, case)


@given(case=ragged_cases())
def test_pages(backend, case):
    check_pages(backend, case)


@given(case=ragged_cases(kinds=("normal", "offset", "ties"), compresses=True))
def test_pages_of_plain_values(backend, case):
    check_pages(backend, case)


BASE = RaggedCase(
    ((3, 90), (0, 0), (16, 7), (5, 36), (2, 2 + 32), (30, 64 + 30)),
    heads=2,
    key_dim=32,
    value_dim=32,
    lag_size=16,
    keep=5,
    dtype=torch.bfloat16,
    spare=2,
    block_size=8,
)
TRAPS = {
    "plain": BASE,
    "cosine": dataclasses.replace(BASE, score="cosine"),
    "keep-all": dataclasses.replace(BASE, keep=16),
    "keep-one": dataclasses.replace(BASE, keep=1),
    "no-sequences": dataclasses.replace(BASE, sequences=()),
    "no-heads": dataclasses.replace(BASE, heads=0),
    "no-capacity": dataclasses.replace(BASE, sequences=((0, 0), (4, 0)), spare=0),
    "no-channels": dataclasses.replace(BASE, key_dim=0, value_dim=0),
    "no-channels-of-value": dataclasses.replace(BASE, value_dim=0),
    "one-channel": dataclasses.replace(BASE, key_dim=1, value_dim=2),
    "page-of-one": dataclasses.replace(BASE, block_size=1),
    "page-is-a-partition": dataclasses.replace(BASE, block_size=16),
    "page-beyond-the-sequence": dataclasses.replace(BASE, block_size=128),
    "hnd": dataclasses.replace(BASE, key_layout=HND, value_layout=HND),
    "nhd-then-hnd": dataclasses.replace(BASE, key_layout=NHD, value_layout=HND),
    "pages-in-order": dataclasses.replace(BASE, seed=3),
    "shared-pages": dataclasses.replace(BASE, shared=True, sequences=((17, 90), (16, 16), (30, 70))),
    "shared-pages-of-one-length": dataclasses.replace(BASE, shared=True, sequences=((24, 90),) * 3),
    "one-long": dataclasses.replace(BASE, sequences=((1, 1 + 16 * 30), (0, 33), (4, 9))),
    "far-start": dataclasses.replace(BASE, sequences=((2**31 - 1, 50), (50, 50), (51, 50))),
    "float64": dataclasses.replace(BASE, dtype=torch.float64),
    **{f"kind-{kind}": dataclasses.replace(BASE, key_kind=kind, value_kind=kind) for kind in KINDS},
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(backend, trap, check):
    check(backend, TRAPS[trap])


# Enough for several threads: equal sequences, one that is longer than all others, and partitions beyond the cache.
LARGE = {
    "equal": dataclasses.replace(
        BASE, sequences=((4, 700),) * 4, key_dim=64, value_dim=64, lag_size=64, block_size=16
    ),
    "one-long": dataclasses.replace(
        BASE, sequences=((0, 90), (4, 4000), (2, 300)), heads=1, key_dim=128, value_dim=96, lag_size=64
    ),
    "large-partitions": dataclasses.replace(
        BASE, sequences=((3, 2500), (9, 3100)), key_dim=64, value_dim=64, lag_size=700, keep=33, block_size=64
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("check_"))
@pytest.mark.parametrize("shape", LARGE)
def test_threads_do_not_matter(kernel_backend, shape, check):
    case = LARGE[shape]
    if kernel_backend.is_slow:
        case = dataclasses.replace(case, sequences=tuple((s, n // 4) for s, n in case.sequences), lag_size=96)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3) if kernel_backend.is_slow else (1, 2, 3, 7):
            torch.set_num_threads(count)
            check(kernel_backend, case)
    finally:
        torch.set_num_threads(threads)


ENGINES = {  # shape of the pool that holds keys and values, and the two views that the operator takes
    "vllm": ("kbrhd", lambda kv: (kv[0], kv[1])),
    "flashinfer-nhd": ("bkrhd", lambda kv: (kv[:, 0], kv[:, 1])),
    "flashinfer-hnd": ("bkhrd", lambda kv: (kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2))),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("engine", ENGINES)
def test_layouts_of_engines(backend, engine, dtype):
    """Keys and values in one pool, as engines have them: written where they lie."""
    case = dataclasses.replace(BASE, dtype=dtype, block_size=16, key_dim=64, value_dim=64)
    pairs = case.make(backend.device)
    key, value, table = case.pages(pairs, backend.device)
    start, length = case.numbers(backend.device)
    order, views = ENGINES[engine]
    plain = torch.stack([key.view, value.view])  # k, blocks, rows, heads, channels
    kv = plain.permute(*("kbrhd".index(dim) for dim in order)).contiguous()
    index = backend.compress_paged_(
        *views(kv), table, start, length, case.lag_size, case.keep, **case.scoring
    )
    assert_numbers(case, start, length)
    for b in range(case.batch):
        block, row = case.place_of(table[b], case.new_length(b))
        new = [x[block, row].transpose(0, 1)[None] for x in views(kv)]
        assert_sequence(backend, case, b, pairs[b], new, index[b : b + 1])
