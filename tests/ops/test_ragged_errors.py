"""Every wrong argument and value of the ragged operators is refused with one text, and nothing is written."""

# ruff: noqa: E501  (tables: one wrong argument a line)

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lagkv_ext
from tests.ops.cases import bits
from tests.ops.test_errors import FLOATS, TOO_LONG, Wrong, assert_refused, call, name_of, traced

ARGUMENTS = {
    "compress_ragged_": ("key", "value", "start", "length", "lag_size", "keep"),
    "compress_varlen": ("key", "value", "cu_seqlens", "start", "lag_size", "keep"),
    "compress_paged_": ("key_cache", "value_cache", "block_table", "start", "length", "lag_size", "keep"),
}
ROWS = {name: arguments[:2] for name, arguments in ARGUMENTS.items()}
NUMBERS = {
    "compress_ragged_": ("start", "length"),
    "compress_varlen": ("cu_seqlens", "start"),
    "compress_paged_": ("start", "length"),
}


def right(op: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Two sequences of 20 and 9 tokens, 3 heads, 4 and 5 channels; the first loses tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = {"compress_ragged_": (2, 3, 22), "compress_varlen": (30, 3), "compress_paged_": (9, 4, 3)}[op]
    key, value = (torch.randn(*shape, dim, generator=generator) for dim in (4, 5))
    tensors = {
        "key": key,
        "value": value,
        "key_cache": key,
        "value_cache": value,
        "start": numbers(2, 3),
        "length": numbers(20, 9),
        "cu_seqlens": numbers(0, 20, 29),
        "block_table": numbers([8, 0, 7, 2, 5], [1, 4, 6, -1, -1]),
    }
    scalars = {"lag_size": 4, "keep": 2}
    return {name: tensors[name].to(device) if name in tensors else scalars[name] for name in ARGUMENTS[op]}


def numbers(*values: int | list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class RaggedWrong(Wrong):
    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        arguments = right(self.op, device)
        return arguments | {self.argument: self.change(arguments)}


def _wrong_rows(op: str) -> list[RaggedWrong]:
    names = ROWS[op]
    layout = {
        "compress_ragged_": "[B, H, capacity, D]",
        "compress_varlen": "[T, H, D]",
        "compress_paged_": "[blocks, block_size, H, D]",
    }[op]
    shape = {"compress_ragged_": [2, 3, 22], "compress_varlen": [30, 3], "compress_paged_": [9, 4, 3]}[op]
    rank = len(shape) + 1
    wrong = []
    for name, dim in zip(names, (4, 5), strict=True):
        wrong += [
            RaggedWrong(
                op,
                name,
                lambda a, name=name: a[name][0],
                f"{name} must have {rank} dimensions {layout}, got shape {[*shape[1:], dim]}",
            ),
            RaggedWrong(
                op,
                name,
                lambda a, name=name: a[name][None],
                f"{name} must have {rank} dimensions {layout}, got shape {[1, *shape, dim]}",
            ),
            *(
                RaggedWrong(
                    op,
                    name,
                    lambda a, name=name, dtype=dtype: a[name].to(dtype),
                    f"{name} must be {FLOATS}, got {str(dtype)[6:]}",
                )
                for dtype in (torch.int64, torch.float8_e4m3fn)
            ),
            RaggedWrong(
                op,
                name,
                lambda a, name=name: torch.cat([a[name]] * 2, -1)[..., ::2],
                f"{name} must have a contiguous last dimension (stride 1), got stride 2",
            ),
        ]
    key, value = names
    wrong.append(
        RaggedWrong(
            op,
            value,
            lambda a: a[value].half(),
            f"{value} must have the dtype of {key} (float32), got float16",
        )
    )
    dims = {
        "compress_ragged_": ("batch", "heads", "capacity"),
        "compress_varlen": ("rows", "heads"),
        "compress_paged_": ("blocks", "block_size", "heads"),
    }[op]
    for i, what in enumerate(dims):
        smaller = [n - (j == i) for j, n in enumerate(shape)]
        wrong.append(
            RaggedWrong(
                op,
                value,
                lambda a, i=i: a[value].narrow(i, 0, a[value].shape[i] - 1),
                f"{value} must agree with {key} in {what} {[*shape, 4]}, got shape {[*smaller, 5]}",
            )
        )
    return wrong


def _wrong_numbers(op: str) -> list[RaggedWrong]:
    wrong = []
    for name in NUMBERS[op]:
        wrong += [
            RaggedWrong(
                op,
                name,
                lambda a, name=name: a[name][None],
                f"{name} must have 1 dimension, got shape {[1, 3 if name == 'cu_seqlens' else 2]}",
            ),
            RaggedWrong(op, name, lambda a, name=name: a[name].long(), f"{name} must be int32, got int64"),
            RaggedWrong(op, name, lambda a, name=name: a[name].float(), f"{name} must be int32, got float32"),
            RaggedWrong(
                op,
                name,
                lambda a, name=name: torch.stack([a[name]] * 2, 1)[:, 0],
                f"{name} must be contiguous, got stride 2",
            ),
        ]
        if name != "cu_seqlens":
            wrong.append(
                RaggedWrong(
                    op,
                    name,
                    lambda a, name=name: a[name][:1],
                    f"{name} must have one number for each of 2 sequences, got shape [1]",
                )
            )
    return wrong


def _wrong_scalars(op: str) -> list[RaggedWrong]:
    return [
        RaggedWrong(op, "lag_size", lambda a: 0, "lag_size must be at least 1, got 0"),
        RaggedWrong(op, "keep", lambda a: 0, "keep must be at least 1, got 0"),
        RaggedWrong(op, "keep", lambda a: 5, "keep must be at most lag_size (4), got 5"),
        RaggedWrong(op, "value_weight", lambda a: math.nan, "value_weight must be finite, got nan"),
        RaggedWrong(
            op, "score", lambda a: "median", "score must be 'std', 'cosine' or 'blend', got 'median'"
        ),
    ]


WRONG = [
    *(wrong for op in ARGUMENTS for wrong in (*_wrong_rows(op), *_wrong_numbers(op), *_wrong_scalars(op))),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: a["cu_seqlens"][:0], "cu_seqlens must have at least 1 number (B + 1 of them), got shape [0]"),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: a["cu_seqlens"][:2], "start must have one number for each of 1 sequences, got shape [2]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: a["block_table"][0], "block_table must have 2 dimensions [B, max_blocks], got shape [5]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: a["block_table"].long(), "block_table must be int32, got int64"),
    RaggedWrong("compress_paged_", "block_table", lambda a: torch.stack([a["block_table"]] * 2, 2)[:, :, 0], "block_table must have a contiguous last dimension (stride 1), got stride 2"),
    RaggedWrong("compress_paged_", "block_table", lambda a: a["block_table"][:1], "start must have one number for each of 1 sequences, got shape [2]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: torch.empty(0, 2**29, dtype=torch.int32, device=a["start"].device), f"block_table.size(1) * block_size must come to at most 2147483647 tokens, got {TOO_LONG}"),
]  # fmt: skip

# Values: on the CPU refused before anything is written; a device finds out in its kernels and leaves the sequence alone.
VALUES = [
    RaggedWrong("compress_ragged_", "start", lambda a: numbers(-1, 3), "start must be at least 0, got -1 for sequence 0"),
    RaggedWrong("compress_ragged_", "start", lambda a: numbers(2, -(2**31)), "start must be at least 0, got -2147483648 for sequence 1"),
    RaggedWrong("compress_ragged_", "length", lambda a: numbers(20, -1), "length must be between 0 and the capacity (22), got -1 for sequence 1"),
    RaggedWrong("compress_ragged_", "length", lambda a: numbers(23, 9), "length must be between 0 and the capacity (22), got 23 for sequence 0"),
    RaggedWrong("compress_ragged_", "length", lambda a: numbers(20, 2**31 - 1), "length must be between 0 and the capacity (22), got 2147483647 for sequence 1"),
    RaggedWrong("compress_varlen", "start", lambda a: numbers(2, -3), "start must be at least 0, got -3 for sequence 1"),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: numbers(1, 20, 29), "cu_seqlens must begin with 0, got 1"),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: numbers(-4, 20, 29), "cu_seqlens must begin with 0, got -4"),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: numbers(0, 20, 19), "cu_seqlens must not decrease, got 19 after 20 at 2"),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: numbers(0, -20, 29), "cu_seqlens must not decrease, got -20 after 0 at 1"),
    RaggedWrong("compress_varlen", "cu_seqlens", lambda a: numbers(0, 31, 31), "cu_seqlens must be at most the rows of key (30), got 31 at 1"),
    RaggedWrong("compress_paged_", "start", lambda a: numbers(-1, 3), "start must be at least 0, got -1 for sequence 0"),
    RaggedWrong("compress_paged_", "length", lambda a: numbers(20, -1), "length must be between 0 and the rows of its blocks (20), got -1 for sequence 1"),
    RaggedWrong("compress_paged_", "length", lambda a: numbers(21, 9), "length must be between 0 and the rows of its blocks (20), got 21 for sequence 0"),
    RaggedWrong("compress_paged_", "block_table", lambda a: numbers([8, 0, 7, 9, 5], [1, 4, 6, -1, -1]), "block_table must hold blocks between 0 and 8, got 9 at [0, 3]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: numbers([8, 0, 7, 2, 5], [1, -1, 6, -1, -1]), "block_table must hold blocks between 0 and 8, got -1 at [1, 1]"),
    RaggedWrong("compress_paged_", "length", lambda a: numbers(20, 13), "block_table must hold blocks between 0 and 8, got -1 at [1, 3]"),
]  # fmt: skip
# A kernel cannot notice these, so only the CPU and validate=True do.
TWICE = "block_table must not hold a block twice that is written, got block"
OVERLAPS = [
    RaggedWrong("compress_paged_", "block_table", lambda a: numbers([8, 0, 7, 2, 5], [0, 4, 6, -1, -1]), f"{TWICE} 0 at [0, 1] and [1, 0]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: numbers([8, 0, 7, 2, 5], [1, 4, 8, -1, -1]), f"{TWICE} 8 at [0, 0] and [1, 2]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: numbers([8, 7, 7, 2, 5], [1, 4, 6, -1, -1]), f"{TWICE} 7 at [0, 1] and [0, 2]"),
    RaggedWrong("compress_paged_", "block_table", lambda a: numbers([8, 0, 7, 2, 8], [1, 4, 6, -1, -1]), f"{TWICE} 8 at [0, 0] and [0, 4]"),
]  # fmt: skip


@pytest.mark.parametrize("op", ARGUMENTS)
def test_right_arguments_are_right(backend, op):
    arguments = right(op, backend.device)
    call(getattr(backend, op), arguments)
    if "length" in arguments:
        assert arguments["length"].tolist() == [14, 9]
        assert arguments["start"].tolist() == [8, 3]


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_refused(registered_backend, wrong):
    assert_refused(getattr(registered_backend, wrong.op), wrong, wrong.arguments(registered_backend.device))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_refused_on_another_device(registered_backend, op):
    if registered_backend.device.type != "cpu":
        pytest.skip("the meta device takes precedence over the device that is expected here")
    for name in ARGUMENTS[op][1:-2]:
        wrong = RaggedWrong(
            op,
            name,
            lambda a, name=name: a[name].to("meta"),
            f"{name} must be on the device of {ROWS[op][0]} (cpu), got meta",
        )
        assert_refused(getattr(registered_backend, op), wrong, wrong.arguments())


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_a_fake_kernel_refuses_what_decides_its_result(wrong):
    if not wrong.fake_refuses:
        traced(wrong)
        return
    with pytest.raises(RuntimeError) as caught:
        traced(wrong)
    assert str(caught.value).split("\n")[0] == wrong.message


def _on(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@contextlib.contextmanager
def races_allowed() -> Iterator[None]:
    """Returns only a race of the executor's faults, with which it stops."""
    try:
        yield
    except AssertionError as fault:
        if not str(fault).startswith("race"):
            raise


@pytest.mark.parametrize("wrong", [*VALUES, *OVERLAPS], ids=name_of)
def test_wrong_values(kernel_backend, wrong):
    backend = kernel_backend
    arguments = _on(wrong.arguments(), backend.device)
    if not backend.runs_on_device:
        return assert_refused(getattr(backend, wrong.op), wrong, arguments)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    if wrong in OVERLAPS:
        # Rows are undefined, for threads race to them; that no access before was out of bounds the executor has seen.
        with races_allowed():
            call(getattr(backend, wrong.op), arguments)
        return None
    result = call(getattr(backend, wrong.op), arguments)
    if wrong.op == "compress_varlen" and wrong.argument == "cu_seqlens":
        assert not result[3].any()
        assert (result[2] == -1).all()
        return None
    if wrong.op == "compress_varlen":
        assert result[3].tolist() == [0, 14, 23]
        assert result[4].tolist() == [8, -3]
        assert torch.equal(bits(result[0][14:23]), bits(before["key"][20:29]))
        return None
    bad = (
        int(wrong.text.split("sequence ")[1])
        if "sequence" in wrong.text
        else int(wrong.text.split("[")[1][0])
    )
    for name in ("start", "length"):
        assert arguments[name][bad] == before[name][bad]
        assert arguments[name][1 - bad] == {"start": (8, 3), "length": (14, 9)}[name][1 - bad]
    assert (result[bad] == -1).all()
    if wrong.op == "compress_ragged_":
        for name in ("key", "value"):
            assert torch.equal(arguments[name][bad], before[name][bad])
    elif bad == 0:
        for name in ROWS[wrong.op]:
            assert torch.equal(arguments[name], before[name])


CHECKS = {  # the operator behind validate=True, and what it is given beside the numbers
    "compress_ragged_": ("_check_slots", ("start", "length"), lambda a: (a["key"].shape[2],)),
    "compress_varlen": ("_check_packed", ("cu_seqlens", "start"), lambda a: (a["key"].shape[0],)),
    "compress_paged_": (
        "_check_pages",
        ("block_table", "start", "length"),
        lambda a: (a["lag_size"], a["keep"], *a["key_cache"].shape[:2]),
    ),
}


@pytest.mark.parametrize("wrong", [*VALUES, *OVERLAPS], ids=name_of)
def test_copied_numbers_are_refused(wrong):
    """Path of validate=True on a device, from the copy to the host on."""
    check, names, sizes = CHECKS[wrong.op]
    arguments = wrong.arguments()
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.lagkv, check)(*(arguments[name] for name in names), *sizes(arguments))
    assert str(caught.value).split("\n")[0] == wrong.message
    arguments = right(wrong.op)
    getattr(torch.ops.lagkv, check)(*(arguments[name] for name in names), *sizes(arguments))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_copied_numbers_of_a_wrong_shape_are_refused(op):
    """Nothing is read past the end of a tensor that is too short."""
    check, names, sizes = CHECKS[op]
    arguments = right(op)
    for name in names:
        for wrong in (arguments[name][:1], arguments[name][None], arguments[name].long()):
            changed = [wrong if other == name else arguments[other] for other in names]
            if name == "block_table" and wrong.shape == (1, 5):
                changed[1:] = (x[:2] for x in changed[1:])
            with pytest.raises(RuntimeError, match=rf"lagkv::{op}: .* must "):
                getattr(torch.ops.lagkv, check)(*changed, *sizes(arguments))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_validate_changes_nothing_on_the_cpu(op):
    tensors = {name: x for name, x in right(op).items() if isinstance(x, Tensor)}
    again = {name: x.clone() for name, x in tensors.items()}
    expected = getattr(lagkv_ext, op)(**tensors, lag_size=4, keep=2)
    found = getattr(lagkv_ext, op)(**again, lag_size=4, keep=2, validate=True)
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its) or op == "compress_varlen"
    assert all(torch.equal(again[name], x) for name, x in tensors.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wrong", [*VALUES, *OVERLAPS], ids=name_of)
def test_validate_refuses_on_a_device(wrong):
    arguments = _on(wrong.arguments(), torch.device("cuda"))
    target = getattr(lagkv_ext, wrong.op)
    names = [name for name in arguments if name not in ("lag_size", "keep")]

    def validated(*values: Any) -> Any:
        return target(*values[: len(names)], lag_size=4, keep=2, validate=True)

    assert_refused(validated, wrong, arguments)


PYTHON_WRONG = {
    "keep_ratio": ({"keep_ratio": 1.5}, ValueError, "keep_ratio must be in (0, 1], got 1.5"),
    "both": ({"keep_ratio": 0.5, "keep": 2}, ValueError, "give keep or keep_ratio, not both; got keep=2 and keep_ratio=0.5"),
    "keep": ({"keep": 9}, RuntimeError, "lagkv::{op}: keep must be at most lag_size (4), got 9"),
    "score": ({"score": "mean"}, RuntimeError, "lagkv::{op}: score must be 'std', 'cosine' or 'blend', got 'mean'"),
}  # fmt: skip


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("wrong", PYTHON_WRONG)
def test_python_functions_refuse(op, wrong):
    change, error, text = PYTHON_WRONG[wrong]
    arguments = right(op)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    with pytest.raises(error) as caught:
        getattr(lagkv_ext, op)(**tensors, **{"lag_size": 4, **change})
    assert str(caught.value).split("\n")[0] == text.format(op=op)
    for name, x in tensors.items():
        assert torch.equal(x, before[name])


def test_a_page_may_be_shared_where_no_one_writes_it(backend):
    """The first page holds the first 4 tokens of both sequences, before the start of either."""
    arguments = right("compress_paged_", backend.device)
    arguments["block_table"] = numbers([8, 0, 7, 2, 5], [8, 4, 6, -1, -1]).to(backend.device)
    arguments["start"] = numbers(4, 5).to(backend.device)
    before = arguments["key_cache"][8].clone()
    call(backend.compress_paged_, arguments)
    assert arguments["length"].tolist() == [14, 9]
    assert torch.equal(arguments["key_cache"][8], before)
