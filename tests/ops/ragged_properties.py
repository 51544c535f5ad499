"""Properties of the ragged operators on every backend and case: every sequence as `compress` leaves it alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.backends import Backend
from tests.ops.cases import CANARY, bits
from tests.ops.compare import Band, assert_bits, assert_head_selection, assert_selection, score_band
from tests.ops.properties import rows, untouched
from tests.ops.ragged_cases import RaggedCase


def check_slots(backend: Backend, case: RaggedCase) -> None:
    pairs = case.make(backend.device)
    placed = case.slots(pairs, backend.device)
    start, length = case.numbers(backend.device)
    before = [(p.storage.clone(), p.outside()) for p in placed]
    index = backend.compress_ragged_(
        *(p.view for p in placed), start, length, case.lag_size, case.keep, **case.method
    )
    assert index.shape == placed[0].view.shape[:3]
    assert_numbers(case, start, length)
    for p, (storage, outside) in zip(placed, before, strict=True):
        assert_bits(p.storage[outside], storage[outside], "memory around a slot")
    for b, (_, tokens) in enumerate(case.sequences):
        new = [p.view[b : b + 1, :, : case.new_length(b)] for p in placed]
        assert_sequence(backend, case, b, pairs[b], new, index[b : b + 1])
        for p in placed:
            assert_canaries(p.view[b, :, tokens:], "a row past the length")


def check_packed(backend: Backend, case: RaggedCase) -> None:
    pairs = case.make(backend.device)
    placed = case.packed(pairs, backend.device)
    start, _ = case.numbers(backend.device)
    cu_seqlens = case.cu_seqlens(backend.device)
    numbers_before = start.clone(), cu_seqlens.clone()
    with untouched(*placed):
        new_key, new_value, index, new_cu_seqlens, new_start = backend.compress_varlen(
            *(p.view[:, 0] for p in placed), cu_seqlens, start, case.lag_size, case.keep, **case.method
        )
    for actual, expected in zip((start, cu_seqlens), numbers_before, strict=True):
        assert_bits(actual, expected, "an input")
    for x, p in zip((new_key, new_value), placed, strict=True):
        assert x.shape == p.view[:, 0].shape
        assert x.is_contiguous()
    total = placed[0].view.shape[0]
    assert index.shape == (case.heads, total)
    ends = [sum(case.new_length(i) for i in range(b)) for b in range(case.batch + 1)]
    assert new_cu_seqlens.tolist() == ends
    assert new_start.tolist() == [case.new_start(b) for b in range(case.batch)]
    for x in (index, new_cu_seqlens, new_start):
        assert x.dtype == torch.int32
    for b in range(case.batch):
        new = [x[ends[b] : ends[b + 1]].transpose(0, 1)[None] for x in (new_key, new_value)]
        assert_sequence(backend, case, b, pairs[b], new, index[None, :, ends[b] : ends[b + 1]])
    assert (index[:, ends[-1] :] == -1).all()


def check_pages(backend: Backend, case: RaggedCase) -> None:
    pairs = case.make(backend.device)
    key, value, table = case.pages(pairs, backend.device)
    start, length = case.numbers(backend.device)
    table_before = table.clone()
    before = [(p.storage.clone(), p.outside()) for p in (key, value)]
    index = backend.compress_paged_(
        key.view, value.view, table, start, length, case.lag_size, case.keep, **case.method
    )
    assert index.shape == (case.batch, case.heads, table.shape[1] * case.block_size)
    assert_bits(table, table_before, "block_table")
    assert_numbers(case, start, length)
    used = torch.zeros(key.view.shape[:2], dtype=torch.bool, device=key.view.device)
    for b, (_, tokens) in enumerate(case.sequences):
        block, row = case.place_of(table[b], case.new_length(b))
        new = [p.view[block, row].transpose(0, 1)[None] for p in (key, value)]
        assert_sequence(backend, case, b, pairs[b], new, index[b : b + 1])
        used[case.place_of(table[b], tokens)] = True
    for p, (storage, outside) in zip((key, value), before, strict=True):
        assert_bits(p.storage[outside], storage[outside], "memory around the pool")
        assert_canaries(p.view[~used], "a row that is no sequence's")


CHECKS = (check_slots, check_packed, check_pages)


def assert_sequence(
    backend: Backend,
    case: RaggedCase,
    b: int,
    pair: tuple[Tensor, Tensor],
    new: list[Tensor],
    index: Tensor,
) -> None:
    """Rows ``new`` and ``index [1, H, >= N']`` of sequence ``b`` are those of `compress` of its ``pair`` alone."""
    start, length = case.sequences[b]
    count = case.new_length(b)
    kept = index[:, :, :count]
    if backend.sums_by_alignment:  # alone, a row lies elsewhere, and its sums may be taken in another order
        band = band_of(case, pair, start)
        if case.budget == "head":
            none = torch.empty(*kept.shape[:2], 0)
            assert_head_selection(kept, band, none, length, start, case.keep)
        else:
            assert_selection(kept, band, length, start, case.lag_size, case.keep)
    else:
        expected = backend.compress(*pair, start, case.lag_size, case.keep, **case.method)[2]
        assert_bits(kept, expected, f"index of sequence {b}")
    assert (index[:, :, count:] == -1).all(), "index past the new length is not -1"
    for x, mine, name in zip(pair, new, ("key", "value"), strict=True):
        assert_bits(mine, rows(x, kept), f"{name} of sequence {b}")


def band_of(case: RaggedCase, pair: tuple[Tensor, Tensor], start: int) -> Band:
    key, value = (x.cpu() for x in pair)
    return score_band(key, value, start, case.lag_size, case.value_weight, case.score, case.smooth)


def assert_numbers(case: RaggedCase, start: Tensor, length: Tensor) -> None:
    assert start.tolist() == [case.new_start(b) for b in range(case.batch)]
    assert length.tolist() == [case.new_length(b) for b in range(case.batch)]


def assert_canaries(x: Tensor, what: str) -> None:
    assert (bits(x) == CANARY[x.dtype]).all(), f"{what} was written"
