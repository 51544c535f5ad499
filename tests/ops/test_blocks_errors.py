"""Every wrong argument and value of `compress_blocks` is refused with one text, and nothing is written."""

# ruff: noqa: E501  (tables: one wrong argument a line)

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lagkv_ext
from tests.ops.cases import bits
from tests.ops.test_errors import FLOATS, Wrong, assert_refused, call, name_of, traced
from tests.ops.test_ragged_errors import numbers

OP = "compress_blocks"
ARGUMENTS = (
    "key_cache",
    "value_cache",
    "source_table",
    "target_table",
    "m_before",
    "m_after",
    "sink_size",
    "lag_size",
    "keep",
)
TENSORS = ARGUMENTS[:6]


def right(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Two sequences of partitions of 4 tokens in blocks of 2, 3 heads, 4 and 5 channels; the sink ends inside a block."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(24, 2, 3, dim, generator=generator) for dim in (4, 5))
    source = numbers([0, 2, 4, 6, 8, 10, 12, 17], [-1, 3, -1, 5, 7, 9, 11, 18])
    target = numbers([1, 13, 14], [15, 16, -1])
    tensors = key, value, source, target, numbers(0, 1), numbers(2, 2)
    return dict(zip(ARGUMENTS, (*(x.to(device) for x in tensors), 3, 4, 2), strict=True))


class BlocksWrong(Wrong):
    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        arguments = right(device)
        return arguments | {self.argument: self.change(arguments)}


def wrong(argument: str, change: Any, text: str) -> BlocksWrong:
    return BlocksWrong(OP, argument, change if callable(change) else lambda a: change, text)


def _wrong_pools() -> list[BlocksWrong]:
    layouts = "4 dimensions [blocks, block_size, H, D], or 6 [blocks, block_size / r, r, H, D / c, c]"
    found = []
    for name, dim in (("key_cache", 4), ("value_cache", 5)):
        found += [
            wrong(
                name, lambda a, name=name: a[name][0], f"{name} must have {layouts}, got shape {[2, 3, dim]}"
            ),
            wrong(
                name,
                lambda a, name=name: a[name][None],
                f"{name} must have {layouts}, got shape {[1, 24, 2, 3, dim]}",
            ),
            wrong(name, lambda a, name=name: a[name].long(), f"{name} must be {FLOATS}, got int64"),
        ]
    for i, what in enumerate(("blocks", "block_size", "heads")):
        smaller = [n - (j == i) for j, n in enumerate((24, 2, 3))]
        found.append(
            wrong(
                "value_cache",
                lambda a, i=i: a["value_cache"].narrow(i, 0, a["value_cache"].shape[i] - 1),
                f"value_cache must agree with key_cache in {what} [24, 2, 3, 4], got shape {[*smaller, 5]}",
            )
        )
    return found  # fmt: skip


def _wrong_tables() -> list[BlocksWrong]:
    found = []
    for name, size, of in (("source_table", 8, "max_source"), ("target_table", 3, "max_target")):
        found += [
            wrong(
                name,
                lambda a, name=name: a[name][0],
                f"{name} must have 2 dimensions [B, {of}], got shape [{size}]",
            ),
            wrong(name, lambda a, name=name: a[name].long(), f"{name} must be int32, got int64"),
            wrong(
                name,
                lambda a, name=name: torch.stack([a[name]] * 2, 2)[:, :, 0],
                f"{name} must have a contiguous last dimension (stride 1), got stride 2",
            ),
        ]
    for name in ("m_before", "m_after"):
        found += [
            wrong(
                name, lambda a, name=name: a[name][None], f"{name} must have 1 dimension, got shape [1, 2]"
            ),
            wrong(name, lambda a, name=name: a[name].long(), f"{name} must be int32, got int64"),
            wrong(
                name,
                lambda a, name=name: torch.stack([a[name]] * 2, 1)[:, 0],
                f"{name} must be contiguous, got stride 2",
            ),
            wrong(
                name,
                lambda a, name=name: a[name][:1],
                f"{name} must have one number for each of 2 sequences, got shape [1]",
            ),
        ]
    return found  # fmt: skip


def huge(arguments: dict[str, Any], entries: int) -> Tensor:
    return torch.empty(0, entries, dtype=torch.int32, device=arguments["m_after"].device)


WRONG = [
    *_wrong_pools(),
    *_wrong_tables(),
    wrong("value_cache", lambda a: a["value_cache"].half(), "value_cache must have the dtype of key_cache (float32), got float16"),
    wrong("target_table", lambda a: a["target_table"][:1], "target_table must have one row for each of 2 sequences, got shape [1, 3]"),
    wrong("source_table", lambda a: huge(a, 2**30), f"source_table.size(1) * block_size must come to at most 2147483647 tokens, got {2**31}"),
    wrong("target_table", lambda a: huge(a, 2**30), f"target_table.size(1) * block_size must come to at most 2147483647 tokens, got {2**31}"),
    wrong("sink_size", -1, "sink_size must be at least 0, got -1"),
    wrong("lag_size", 0, "lag_size must be at least 1, got 0"),
    wrong("lag_size", 5, "the block size of key_cache (2) must divide lag_size, got 5; 4 or 6 would fit"),
    wrong("keep", 0, "keep must be at least 1, got 0"),
    wrong("keep", 5, "keep must be at most lag_size (4), got 5"),
    wrong("keep", 3, "the block size of key_cache (2) must divide keep, got 3; 2 (ratio 0.5) or 4 (ratio 1) would fit"),
    wrong("keep", 1, "the block size of key_cache (2) must divide keep, got 1; 2 (ratio 0.5) would fit"),
    wrong("value_weight", math.nan, "value_weight must be finite, got nan"),
    wrong("score", "median", "score must be 'std', 'cosine' or 'blend', got 'median'"),
    wrong("smooth", 2, "smooth must be odd and at least 1, got 2"),
]  # fmt: skip

# Values: on the CPU refused before anything is written; a device finds out in its kernel and leaves the sequence alone.
VALUES = [
    wrong("m_before", lambda a: numbers(-1, 1), "m_before must be at least 0, got -1 for sequence 0"),
    wrong("m_after", lambda a: numbers(2, 0), "m_after must be at least m_before (1), got 0 for sequence 1"),
    wrong("m_after", lambda a: numbers(3, 2), "source_table must have room for the 19 tokens up to the partition behind m_after (3), got room for 16, for sequence 0"),
    wrong("m_after", lambda a: numbers(2**31 - 1, 2), f"source_table must have room for the {3 + 4 * 2**31} tokens up to the partition behind m_after (2147483647), got room for 16, for sequence 0"),
    wrong("sink_size", 5, "source_table must have room for the 17 tokens up to the partition behind m_after (2), got room for 16, for sequence 0"),
    wrong("target_table", lambda a: a["target_table"][:, :2], "target_table must have room for 6 rows, got room for 4, for sequence 0"),
    wrong("source_table", lambda a: numbers([0, 2, 4, 6, 8, 10, 12, 17], [-1, 3, -1, 5, 24, 9, 11, 18]), "source_table must hold blocks between 0 and 23, got 24 at [1, 4]"),
    wrong("source_table", lambda a: numbers([0, 2, 4, 6, 8, 10, 12, -1], [-1, 3, -1, 5, 7, 9, 11, 18]), "source_table must hold blocks between 0 and 23, got -1 at [0, 7]"),
    wrong("source_table", lambda a: numbers([0, 2, 4, 6, 8, 10, 12, 17], [-1, 24, -1, 5, 7, 9, 11, 18]), "source_table must hold blocks between 0 and 23, got 24 at [1, 1]"),
    wrong("target_table", lambda a: numbers([1, 13, 14], [15, -16, -1]), "target_table must hold blocks between 0 and 23, got -16 at [1, 1]"),
    wrong("target_table", lambda a: numbers([1, 13, 24], [15, 16, -1]), "target_table must hold blocks between 0 and 23, got 24 at [0, 2]"),
]  # fmt: skip
OVERLAPS = [
    wrong("target_table", lambda a: numbers([1, 13, 1], [15, 16, -1]), "target_table must hold blocks that are in use once, got block 1 at [0, 0] and in target_table at [0, 2]"),
    wrong("target_table", lambda a: numbers([1, 13, 14], [15, 13, -1]), "target_table must hold blocks that are in use once, got block 13 at [0, 1] and in target_table at [1, 1]"),
    wrong("target_table", lambda a: numbers([1, 13, 14], [15, 12, -1]), "target_table must hold blocks that are in use once, got block 12 at [1, 1] and in source_table at [0, 6]"),
]  # fmt: skip


def test_right_arguments_are_right(backend):
    arguments = right(backend.device)
    before = {name: arguments[name].clone() for name in TENSORS}
    index = call(backend.compress_blocks, arguments)
    assert (index >= 0).sum(dim=2).tolist() == [[6] * 3, [4] * 3]
    assert all(torch.equal(arguments[name], before[name]) for name in TENSORS[2:])


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_refused(registered_backend, wrong):
    assert_refused(registered_backend.compress_blocks, wrong, wrong.arguments(registered_backend.device))


@pytest.mark.parametrize("name", TENSORS[1:])
def test_refused_on_another_device(registered_backend, name):
    if registered_backend.device.type != "cpu":
        pytest.skip("the meta device takes precedence over the device that is expected here")
    text = f"{name} must be on the device of key_cache (cpu), got meta"
    other = wrong(name, lambda a: a[name].to("meta"), text)
    assert_refused(registered_backend.compress_blocks, other, other.arguments())


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_a_fake_kernel_refuses_what_decides_its_result(wrong):
    if not wrong.fake_refuses:
        traced(wrong)
        return
    with pytest.raises(RuntimeError) as caught:
        traced(wrong)
    assert str(caught.value).split("\n")[0] == wrong.message


@pytest.mark.parametrize("wrong", VALUES, ids=name_of)
def test_wrong_values(kernel_backend, wrong):
    arguments = {
        name: x.to(kernel_backend.device) if isinstance(x, Tensor) else x
        for name, x in wrong.arguments().items()
    }
    if not kernel_backend.runs_on_device:
        return assert_refused(kernel_backend.compress_blocks, wrong, arguments)
    before = {name: arguments[name].clone() for name in TENSORS}
    index = call(kernel_backend.compress_blocks, arguments)
    bad = int(wrong.text.split("[")[1][0] if "[" in wrong.text else wrong.text.split("sequence ")[1])
    assert (index[bad] == -1).all()
    everyone = wrong.argument == "sink_size"
    assert (index[1 - bad] >= 0).any() or everyone
    written = arguments["target_table"][bad].clamp(0, 23).unique().tolist()
    served = set() if everyone else set(arguments["target_table"][1 - bad].tolist())
    for name in TENSORS[:2]:
        for block in set(written) - served:
            assert torch.equal(bits(arguments[name][block]), bits(before[name][block]))
    return None


@pytest.mark.parametrize("wrong", OVERLAPS, ids=name_of)
def test_blocks_that_are_written_and_used_twice(registered_backend, wrong):
    if registered_backend.runs_on_device:
        pytest.skip("a device does not notice")
    assert_refused(registered_backend.compress_blocks, wrong, wrong.arguments())


def checked(arguments: dict[str, Any]) -> None:
    """Calls what validate=True calls, with numbers that were copied to the host."""
    pool = arguments["key_cache"]
    numbers = [arguments[name] for name in ARGUMENTS[2:]]
    torch.ops.lagkv._check_blocks(*numbers, pool.shape[0], pool.shape[1])


@pytest.mark.parametrize("wrong", [*VALUES, *OVERLAPS], ids=name_of)
def test_copied_numbers_are_refused(wrong):
    with pytest.raises(RuntimeError) as caught:
        checked(wrong.arguments())
    assert str(caught.value).split("\n")[0] == wrong.message
    checked(right())


@pytest.mark.parametrize("name", TENSORS[2:])
def test_copied_numbers_of_a_wrong_shape_are_refused(name):
    """Nothing is read past the end of a tensor that is too short."""
    arguments = right()
    for changed in (arguments[name][:1], arguments[name][None], arguments[name].long()):
        with pytest.raises(RuntimeError, match=r"lagkv::compress_blocks: .* must "):
            checked(arguments | {name: changed})


def test_validate_changes_nothing_on_the_cpu():
    sizes = {"sink_size": 3, "lag_size": 4, "keep": 2}
    expected, found = right(), right()
    index = lagkv_ext.compress_blocks(*(expected[name] for name in TENSORS), **sizes)
    again = lagkv_ext.compress_blocks(*(found[name] for name in TENSORS), **sizes, validate=True)
    assert torch.equal(index, again)
    assert all(torch.equal(expected[name], found[name]) for name in TENSORS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wrong", [*VALUES, *OVERLAPS], ids=name_of)
def test_validate_refuses_on_a_device(wrong):
    def validated(*values: Any) -> Any:
        sizes = dict(zip(ARGUMENTS[6:], values[6:], strict=True))
        return lagkv_ext.compress_blocks(*values[:6], **sizes, validate=True)

    arguments = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in wrong.arguments().items()}
    assert_refused(validated, wrong, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TENSORS[:2])
def test_layouts_that_a_device_does_not_take_are_refused(name):
    columns = wrong(
        name,
        lambda a: a[name].transpose(2, 3).contiguous().transpose(2, 3),
        f"{name} must have a contiguous last dimension (stride 1), got stride 3",
    )
    split = wrong(
        name,
        lambda a: a[name][:, :, None, :, None],
        f"{name} must have 4 dimensions [blocks, block_size, H, D] on cuda:0, got shape {[24, 2, 1, 3, 1, 4 + (name == 'value_cache')]}",
    )
    for each in (columns, split):
        assert_refused(torch.ops.lagkv.compress_blocks, each, each.arguments("cuda"))


# Memory

PAIRS = [(first, second) for i, second in enumerate(TENSORS) for first in TENSORS[: min(i, 2)]]


@pytest.mark.parametrize("shared", [1, 0])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_that_is_written_is_checked(first, second, shared):
    """Both in one storage: with their last and first bytes over each other, or side by side."""
    arguments = right()
    one, other = arguments[first], arguments[second]
    storage = torch.zeros(one.nbytes + other.nbytes + 4, dtype=torch.uint8)
    for name, x, at in ((first, one, 0), (second, other, one.nbytes - 4 * shared)):
        arguments[name] = storage[at : at + x.nbytes].view(x.dtype).view(x.shape)
        arguments[name].copy_(x)
    if shared:
        before = storage.clone()
        with pytest.raises(RuntimeError, match=rf"lagkv::{OP}: {second} must not overlap {first}, got "):
            call(torch.ops.lagkv.compress_blocks, arguments)
        assert torch.equal(storage, before)
    else:
        call(torch.ops.lagkv.compress_blocks, arguments)


def test_blocks_over_each_other_are_refused():
    arguments = right()
    storage = torch.zeros(24 * 2 * 3 * 4)
    arguments["key_cache"] = storage.as_strided((24, 2, 3, 4), (12, 12, 4, 1))  # the next block's first row
    with pytest.raises(RuntimeError, match=r"key_cache must not overlap itself, got shape .* strides"):
        call(torch.ops.lagkv.compress_blocks, arguments)


@pytest.mark.parametrize(
    "views",
    {
        "vLLM on GPUs [blocks, H, block_size, 2 D]": lambda: torch.zeros(24, 3, 2, 8).transpose(1, 2).split(4, -1),
        "vLLM on CPUs, vec": lambda: (
            (kv := torch.zeros(24, 3, 2, 8))[:, :, 0].unflatten(2, (4, 2)).permute(0, 3, 1, 2),
            kv[:, :, 1].unflatten(2, (2, 4)).transpose(1, 2),
        ),
        "vLLM on CPUs, AMX": lambda: (
            (kv := torch.zeros(24, 3, 2, 8))[:, :, 0].view(24, 3, 1, 2, 2, 2).permute(0, 2, 4, 1, 3, 5),
            kv[:, :, 1].view(24, 3, 2, 1, 2, 2).permute(0, 3, 5, 1, 2, 4),
        ),
    }.items(),
    ids=lambda views: views[0],
)  # fmt: skip
def test_keys_and_values_in_one_pool_are_compressed(views):
    arguments = right()
    arguments["key_cache"], arguments["value_cache"] = views[1]()
    index = call(torch.ops.lagkv.compress_blocks, arguments)
    assert (index >= 0).sum() == 3 * 10
