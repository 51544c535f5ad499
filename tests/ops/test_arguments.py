"""Scalar arguments of every public function: a wrong type or value is refused by name, a symbolic number passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("numpy", reason="arguments may be numbers of numpy")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import lagkv_ext
from lagkv_ext import arguments, formulas
from tests.ops import test_blocks_errors as blocks
from tests.ops import test_ragged_errors as ragged
from tests.ops.test_errors import right

INTEGERS = {"lag_size": 4, "sink_size": 2, "keep": 2, "length": 30, "start": 3, "smooth": 3}
NUMBERS = {"keep_ratio": 0.5, "value_weight": 1.0}
METHOD = ("lag_size", "keep", "keep_ratio", "value_weight", "score", "smooth", "budget")
#: The scalar arguments of every public function.
SCALARS = {
    "compress": (*METHOD, "sink_size"),
    "compress_": (*METHOD, "sink_size", "start"),
    "compress_carried": (*METHOD[:-1], "sink_size"),
    "compress_ragged_": (*METHOD, "sink_size", "validate"),
    "compress_varlen": (*METHOD, "validate"),
    "compress_paged_": (*METHOD, "sink_size", "validate"),
    "compress_blocks": (*METHOD[:-1], "sink_size", "validate"),
    "partition_bounds": ("lag_size", "sink_size"),
    "lag_score": ("lag_size", "sink_size", "value_weight", "score", "smooth"),
    "topk_index": ("keep",),
    "compact": (),
    "keep_count": ("keep_ratio", "lag_size"),
    "next_start": ("length", "start", "lag_size", "keep"),
    "output_length": ("length", "start", "lag_size", "keep"),
    "partition_count": ("length", "start", "lag_size"),
    "compressed_count": ("length", "start", "lag_size"),
}
NO_TEXT = [3, None, b"std", ["std"], torch.zeros(())]
NO_NUMBER = ["0.5", "", b"1", True, 1j, [0.5], torch.tensor(0.5), torch.zeros(2)]
NO_INTEGER = ["8", 8.0, 8.5, math.nan, True, 2j, [8], torch.tensor(8), np.float32(8), np.bool_(True)]
NO_BOOLEAN = [0, 1, "yes", None, torch.tensor(True)]


def function_of(name: str) -> Callable:
    return getattr(lagkv_ext, name, None) or getattr(formulas, name)


def tensors_of(name: str) -> dict[str, Any]:
    if name in formulas.__dict__:
        return {}
    if name == "compress_carried":
        return tensors_of("compress") | {"carried": torch.zeros(2, 3, 1)}
    if name == blocks.OP:
        return {key: blocks.right()[key] for key in blocks.TENSORS}
    of = ragged.right if name in ragged.ARGUMENTS else right
    return {key: x for key, x in of(name).items() if isinstance(x, torch.Tensor)}


def call(name: str, **changed: Any) -> Any:
    """The function with arguments that are right but for those changed."""
    scalars = {key: INTEGERS[key] for key in SCALARS[name] if key in INTEGERS}
    if "keep_ratio" in changed:
        scalars.pop("keep", None)
    if name == "keep_count":
        scalars["keep_ratio"] = 0.5
    return function_of(name)(**{**tensors_of(name), **scalars, **changed})


def wrong_types() -> list[tuple[str, str, Any]]:
    kinds = {
        **dict.fromkeys(INTEGERS, NO_INTEGER),
        **dict.fromkeys(NUMBERS, NO_NUMBER),
        "score": NO_TEXT,
        "budget": NO_TEXT,
        "validate": NO_BOOLEAN,
    }
    optional = ("keep", "keep_ratio")  # None: the default
    return [
        (name, argument, value)
        for name, names in SCALARS.items()
        for argument in names
        for value in (
            *kinds[argument],
            *([] if argument in optional or (name, argument) == ("compress_", "start") else [None]),
        )
    ]


def test_every_public_function_is_listed():
    functions = {
        name
        for name in lagkv_ext.__all__
        if type(getattr(lagkv_ext, name)) is type(function_of) and name[0] != "_"
    }
    assert functions - {"info", "read_settings"} <= set(SCALARS)


@pytest.mark.parametrize("name", SCALARS)
def test_right_arguments_are_right(name):
    call(name)


@pytest.mark.parametrize(("name", "argument", "value"), wrong_types(), ids=str)
def test_a_wrong_type_is_named(name, argument, value):
    with pytest.raises(TypeError) as caught:
        call(name, **{argument: value})
    assert str(caught.value).startswith(f"{argument} must be ")
    assert ", got " in str(caught.value)


FORMULAS = ("next_start", "output_length", "partition_count", "compressed_count")
OUT_OF_RANGE = [
    *((name, "lag_size", 0) for name in ("keep_count", *FORMULAS)),
    *((name, argument, -1) for name in FORMULAS for argument in ("length", "start", "lag_size")),
    *((name, "keep", value) for name in ("next_start", "output_length") for value in (0, -1, 5)),
    *((name, "keep_ratio", value) for name in ("keep_count", "compress", "compress_", "compress_varlen")
      for value in (0.0, -0.5, 1.5, math.nan, math.inf)),
    *((name, argument, 2**63) for name, names in SCALARS.items() for argument in names if argument in INTEGERS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_named(name, argument, value):
    with pytest.raises(ValueError) as caught:
        call(name, **{argument: value})
    assert str(caught.value).startswith(f"{argument} must ")
    assert str(caught.value).endswith(f", got {value}")


def test_keep_and_keep_ratio_exclude_each_other():
    with pytest.raises(
        ValueError, match=r"give keep or keep_ratio, not both; got keep=2 and keep_ratio=0\.5"
    ):
        lagkv_ext.compress(**tensors_of("compress"), keep=2, keep_ratio=0.5)


def test_symbolic_numbers_pass_without_guards():
    """Every integer changes from call to call, and one graph serves them all."""

    def step(key, value, sink_size, lag_size, keep):
        rows = lagkv_ext.output_length(key.shape[2], sink_size, lag_size, keep)
        after = lagkv_ext.next_start(key.shape[2], sink_size, lag_size, keep)
        result = lagkv_ext.compress(key, value, sink_size=sink_size, lag_size=lag_size, keep=keep)
        return *result, rows, after, lagkv_ext.keep_count(0.3, lag_size)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, sink_size, lag_size, keep in (
        (60, 4, 8, 3), (61, 5, 9, 2), (30, 7, 16, 5), (90, 0, 20, 19), (47, 2, 3, 2), (200, 40, 11, 7),
    ):  # fmt: skip
        pair = torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 5)
        expected = step(*pair, sink_size, lag_size, keep)
        for mine, its in zip(compiled(*pair, sink_size, lag_size, keep), expected, strict=True):
            assert torch.equal(mine, its) if isinstance(its, torch.Tensor) else mine == its
    assert counters["stats"]["unique_graphs"] <= 2  # sizes of 0 and 1 are compiled apart


@given(value=st.integers(-(2**63), 2**63 - 1), kind=st.sampled_from([int, np.int64]))
def test_integers_come_back_as_they_are(value, kind):
    found = arguments.integer("n", kind(value))
    assert type(found) is int
    assert found == value


@given(value=st.one_of(st.floats(), st.integers(-(2**60), 2**60)))
def test_numbers_come_back_as_floats(value):
    for given_value in (value, np.float64(value)):
        found = arguments.number("x", given_value)
        assert type(found) is float
        assert math.isnan(found) if value != value else found == float(value)


def test_a_message_is_short_and_reads_no_tensor():
    with pytest.raises(TypeError) as caught:
        arguments.integer("n", torch.empty(3, 4, device="meta"))
    assert str(caught.value) == "n must be an integer, got a tensor of shape [3, 4]"
    with pytest.raises(TypeError) as caught:
        arguments.integer("n", list(range(1000)))
    assert str(caught.value) == "n must be an integer, got a list"
