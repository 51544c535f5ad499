"""The property of `compress_blocks` on every backend and case: kept rows are those that `compress` keeps, and no other
element of a pool is read or written."""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext import reference
from tests.ops.backends import Backend
from tests.ops.blocks_cases import BlocksCase, view_like
from tests.ops.cases import bits
from tests.ops.compare import assert_bits, assert_selection, score_band


def check_blocks(backend: Backend, case: BlocksCase) -> None:
    if backend.runs_on_device:
        case = case.plain
    pairs = case.make(backend.device)
    key, value, source, target = case.pools(pairs, backend.device)
    numbers = case.numbers(backend.device)
    read_only = [x.clone() for x in (source, target, *numbers)]
    before = [placed.storage.clone() for placed in (key, value)]
    index = backend.compress_blocks(
        key.view, value.view, source, target, *numbers, *case.sizes, **case.scoring
    )
    for x, old in zip((source, target, *numbers), read_only, strict=True):
        assert_bits(x, old, "a table or a number")
    assert index.dtype == torch.int32
    assert index.shape == (case.batch, case.heads, target.shape[1] * case.block_size)
    for b in range(case.batch):
        assert_index(backend, case, b, pairs[b], index[b : b + 1])
    for placed, old in zip((key, value), before, strict=True):
        expected = old.clone()
        for b in range(case.batch):
            rows = case.kept(b) + len(case.mixed(b))
            if rows:
                copy_rows(
                    view_like(placed, old),
                    view_like(placed, expected),
                    source[b],
                    target[b],
                    index[b, :, :rows],
                )
        assert_bits(placed.storage, expected, "a pool")


def assert_index(
    backend: Backend, case: BlocksCase, b: int, pair: tuple[Tensor, Tensor], index: Tensor
) -> None:
    """``index [1, H, >= rows]`` holds the tokens that `compress` keeps of the sequence alone, and the mixed ones."""
    first, window, kept = case.first(b), case.window(b), case.kept(b)
    mixed = case.mixed(b)
    assert (index[:, :, kept + len(mixed) :] == -1).all(), "index behind the rows is not -1"
    assert (index[:, :, kept : kept + len(mixed)].cpu() == torch.tensor(mixed, dtype=torch.int32)).all()
    if kept == 0:
        return
    own = [x[:, :, first : window + case.lag_size] for x in pair]
    length = window - first + case.lag_size
    mine = index[:, :, :kept] - first
    if backend.sums_by_alignment:  # alone, a row lies elsewhere, and its sums may be taken in another order
        scoring = case.value_weight, case.score, case.smooth
        band = score_band(*(x.cpu() for x in own), 0, case.lag_size, *scoring)
        behind = torch.arange(window - first, length, dtype=torch.int32, device=index.device)
        whole = torch.cat([mine, behind.expand(1, case.heads, -1)], dim=2)
        assert_selection(whole, band, length, 0, case.lag_size, case.keep)
    else:
        expected = backend.compress(*own, 0, case.lag_size, case.keep, **case.scoring)[2]
        assert_bits(mine, expected[:, :, :kept], f"index of sequence {b}")


def copy_rows(pool: Tensor, to: Tensor, source: Tensor, target: Tensor, index: Tensor) -> None:
    """Copy the tokens ``index [H, rows]`` of ``source`` in ``pool`` to the first rows of ``target`` in ``to``."""
    token, place = index.unique(return_inverse=True)
    rows = reference.compact(reference.block_rows(bits(pool), source, token.long()), place[None])
    reference.write_block_rows(bits(to), target, rows[0])
