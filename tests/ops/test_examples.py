"""One example of every operator in every dtype and score on every backend: what a card is asked first, in seconds.

No drawn cases: the property tests have those. ``make gpu-check`` runs these before anything is timed, and again under
compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lagkv_ext._library import _OPERATORS
from lagkv_ext.arguments import SCORES
from tests.ops import blocks_properties, option_properties, properties, ragged_properties
from tests.ops.backends import Backend
from tests.ops.blocks_cases import BlocksCase
from tests.ops.cases import DTYPES, Case, Layout, place
from tests.ops.ragged_cases import RaggedCase

# A vector layout and one of single elements; a remainder after the last partition.
DENSE = Case(batch=2, heads=2, length=4 + 4 * 32 + 7, key_dim=64, value_dim=20, start=4, lag_size=32, keep=9)
# A sequence to compress, one that is too short, none, and one that was compressed before.
RAGGED = RaggedCase(
    ((4, 4 + 3 * 32 + 7), (4, 60), (0, 0), (13, 13 + 2 * 32)),
    heads=2, key_dim=64, value_dim=20, lag_size=32, keep=9, spare=2, block_size=8, key_kind="offset",
)  # fmt: skip
# First steps, a later one, one that compresses nothing; the sink ends inside a block.
BLOCKS = BlocksCase(
    ((0, 3), (2, 2), (1, 2)),
    heads=2, key_dim=64, value_dim=20, sink=12, lag_size=32, keep=8, spare=2, block_size=8, key_kind="offset",
)  # fmt: skip


def dense(check: Callable[[Backend, Case], None]) -> Callable[[Backend, dict], None]:
    return lambda backend, changes: check(backend, Case(**{**vars(DENSE), "key_kind": "offset", **changes}))


def ragged(check: Callable[[Backend, RaggedCase], None]) -> Callable[[Backend, dict], None]:
    return lambda backend, changes: check(backend, RaggedCase(**{**vars(RAGGED), **changes}))


def topk_index(backend: Backend, changes: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 2, 3, 200, generator=generator).to(changes["dtype"]).round(decimals=1)  # ties
    properties.check_topk_index(backend, score.to(backend.device), 50)


def compact(backend: Backend, changes: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 70, 64, generator=generator).to(changes["dtype"])
    index = torch.randint(0, 70, (2, 2, 40), generator=generator, dtype=torch.int32)
    properties.check_compact(backend, place(x, Layout(row_pad=8), backend.device), index.to(backend.device))


def carried(backend: Backend, changes: dict) -> None:
    option_properties.check_carried(backend, Case(**{**vars(DENSE), "key_kind": "offset", **changes}), 3)


def blocks(backend: Backend, changes: dict) -> None:
    blocks_properties.check_blocks(backend, BlocksCase(**{**vars(BLOCKS), **changes}))


#: An example of each operator: called with a backend and what it must be tried with.
EXAMPLES: dict[str, Callable[[Backend, dict], None]] = {
    "compress": dense(properties.check_compress),
    "compress_carried": carried,
    "compress_": dense(properties.check_in_place),
    "partition_bounds": dense(properties.check_partition_bounds),
    "lag_score": dense(properties.check_lag_score),
    "topk_index": topk_index,
    "compact": compact,
    "compress_ragged_": ragged(ragged_properties.check_slots),
    "compress_varlen": ragged(ragged_properties.check_packed),
    "compress_paged_": ragged(ragged_properties.check_pages),
    "compress_blocks": blocks,
}
WITHOUT_SCORE = ("partition_bounds", "topk_index", "compact")


def test_every_operator_has_an_example():
    assert set(EXAMPLES) == set(_OPERATORS)


EVERY = [(name, score) for name in EXAMPLES for score in (SCORES[:1] if name in WITHOUT_SCORE else SCORES)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_dtype
@pytest.mark.parametrize(("operator", "score"), EVERY)
def test_example(backend, operator, score, dtype):
    changes = {"dtype": dtype} | ({} if operator in WITHOUT_SCORE else {"score": score})
    EXAMPLES[operator](backend, changes)
