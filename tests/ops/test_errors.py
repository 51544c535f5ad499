"""Every wrong argument of every operator is refused with one text, and nothing is written.

A fake kernel refuses what its result's shape, dtype and device depend on; all else is refused when the graph runs.
"""

# ruff: noqa: E501  (tables: one wrong argument a line)

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lagkv_ext
from tests.ops.backends import cpu_isa
from tests.ops.cases import bits

SCALARS = {"start": 2, "lag_size": 4, "keep": 2}
PAIR = ("key", "value")
ARGUMENTS = {
    "compress": (*PAIR, "start", "lag_size", "keep"),
    "compress_": (*PAIR, "start", "lag_size", "keep"),
    "lag_score": (*PAIR, "start", "lag_size"),
    "partition_bounds": ("x", "start", "lag_size"),
    "topk_index": ("score", "keep"),
    "compact": ("x", "index"),
}
SCORING = ("value_weight", "score", "smooth", "budget", "scores", "sink_size")  # given by name
TOO_LONG = 2**31
FLOATS = "float16, bfloat16, float32 or float64"


def right(op: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments with which ``op`` works: 2 batches, 3 heads, 20 tokens, 4 and 5 channels."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "key": torch.randn(2, 3, 20, 4, generator=generator),
        "value": torch.randn(2, 3, 20, 5, generator=generator),
        "x": torch.randn(2, 3, 20, 4, generator=generator),
        "index": torch.randint(0, 20, (2, 3, 6), generator=generator, dtype=torch.int32),
        "score": torch.randn(2, 3, 8, generator=generator),
    }
    return {name: tensors[name].to(device) if name in tensors else SCALARS[name] for name in ARGUMENTS[op]}


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One wrong argument: ``change`` makes it from the right ones; ``text`` is all of the message after ``lagkv::op:``."""

    op: str
    argument: str
    change: Callable[[dict[str, Any]], Any]
    text: str

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        arguments = right(self.op, device)
        return arguments | {self.argument: self.change(arguments)}

    @property
    def fake_refuses(self) -> bool:
        """The shape, dtype or device of the result depends on the argument."""
        scalars = {
            **dict.fromkeys(("compress", "compress_"), ("start must be", "lag_size must", "keep must")),
            **dict.fromkeys(("lag_score", "partition_bounds"), ("start must be", "lag_size must")),
            "topk_index": ("keep must be at least",),
        }
        return (
            self.text.startswith(scalars.get(self.op, ()))
            or re.search(r"must have (\d dimensions|at least 1 dimension) \[", self.text) is not None
            or (FLOATS in self.text and self.op != "topk_index")
            or "must be on the device of" in self.text
        )

    @property
    def message(self) -> str:
        return f"lagkv::{self.op}: {self.text}"


def _long(dtype: torch.dtype, *trailing: int) -> Callable[[dict[str, Any]], Tensor]:
    """A tensor of 2^31 tokens in the memory of one."""
    return lambda a: torch.empty(2, 3, 1, *trailing, dtype=dtype, device=_device(a)).expand(
        2, 3, TOO_LONG, *trailing
    )


def _device(arguments: dict[str, Any]) -> torch.device:
    return next(x.device for x in arguments.values() if isinstance(x, Tensor))


def _wrong_rows(op: str, name: str) -> list[Wrong]:
    return [
        Wrong(op, name, lambda a: a[name][0], f"{name} must have 4 dimensions [B, H, N, D], got shape [3, 20, {4 + (name == 'value')}]"),
        Wrong(op, name, lambda a: a[name][None], f"{name} must have 4 dimensions [B, H, N, D], got shape [1, 2, 3, 20, {4 + (name == 'value')}]"),
        *(
            Wrong(op, name, lambda a, dtype=dtype: a[name].to(dtype), f"{name} must be {FLOATS}, got {str(dtype)[6:]}")
            for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
        ),
        Wrong(op, name, _long(torch.float32, 4), f"{name} must have at most 2147483647 tokens, got 2147483648"),
        Wrong(op, name, lambda a: torch.cat([a[name]] * 2, -1)[..., ::2], f"{name} must have a contiguous last dimension (stride 1), got stride 2"),
        Wrong(op, name, lambda a: a[name].transpose(2, 3).contiguous().transpose(2, 3), f"{name} must have a contiguous last dimension (stride 1), got stride 20"),
    ]  # fmt: skip


def _wrong_pair(op: str) -> list[Wrong]:
    return [
        *_wrong_rows(op, "key"),
        *_wrong_rows(op, "value"),
        Wrong(op, "value", lambda a: a["value"].half(), "value must have the dtype of key (float32), got float16"),
        Wrong(op, "key", lambda a: a["key"].double(), "value must have the dtype of key (float64), got float32"),
        Wrong(op, "value", lambda a: a["value"][:1], "value must agree with key in batch [2, 3, 20, 4], got shape [1, 3, 20, 5]"),
        Wrong(op, "value", lambda a: a["value"][:, :2], "value must agree with key in heads [2, 3, 20, 4], got shape [2, 2, 20, 5]"),
        Wrong(op, "key", lambda a: a["key"][:, :, 1:], "value must agree with key in tokens [2, 3, 19, 4], got shape [2, 3, 20, 5]"),
        *(
            Wrong(op, "value_weight", lambda a, weight=weight: weight, f"value_weight must be finite, got {weight}")
            for weight in (math.nan, math.inf, -math.inf)
        ),
        *(
            Wrong(op, "score", lambda a, score=score: score, f"score must be 'std', 'cosine' or 'blend', got '{score}'")
            for score in ("median", "", "STD", "std ")
        ),
    ]  # fmt: skip


def _wrong_start(op: str) -> list[Wrong]:
    return [
        Wrong(op, "start", lambda a, n=n: n, f"start must be at least 0, got {n}") for n in (-1, -(2**40))
    ]


def _wrong_lag_size(op: str) -> list[Wrong]:
    return [
        Wrong(op, "lag_size", lambda a, n=n: n, f"lag_size must be at least 1, got {n}")
        for n in (0, -1, -(2**40))
    ]


def _wrong_keep(op: str, bound_name: str, bound: int) -> list[Wrong]:
    low = [Wrong(op, "keep", lambda a, n=n: n, f"keep must be at least 1, got {n}") for n in (0, -1)]
    return low + [
        Wrong(op, "keep", lambda a, n=n: n, f"keep must be at most {bound_name} ({bound}), got {n}")
        for n in (bound + 1, 2**40)
    ]


WRONG = [
    *(wrong for op in ("compress", "compress_") for wrong in _wrong_pair(op)),
    *(wrong for op in ("compress", "compress_") for wrong in _wrong_keep(op, "lag_size", 4)),
    *_wrong_pair("lag_score"),
    *_wrong_rows("partition_bounds", "x"),
    *(wrong for op in ("compress", "compress_", "lag_score", "partition_bounds") for wrong in _wrong_start(op)),
    *(wrong for op in ("compress", "compress_", "lag_score", "partition_bounds") for wrong in _wrong_lag_size(op)),
    Wrong("topk_index", "score", lambda a: a["score"][0, 0, 0], "score must have at least 1 dimension [..., L], got a scalar"),
    *(
        Wrong("topk_index", "score", lambda a, dtype=dtype: a["score"].to(dtype), f"score must be {FLOATS}, got {str(dtype)[6:]}")
        for dtype in (torch.int32, torch.bool)
    ),
    Wrong("topk_index", "score", lambda a: a["score"][..., ::2], "score must have a contiguous last dimension (stride 1), got stride 2"),
    Wrong("topk_index", "score", lambda a: a["score"][0, 0, :1].expand(TOO_LONG), "score must have at most 2147483647 columns, got 2147483648"),
    *_wrong_keep("topk_index", "the last dimension of score", 8),
    *_wrong_rows("compact", "x"),
    Wrong("compact", "index", lambda a: a["index"][0], "index must have 3 dimensions [B, H, K], got shape [3, 6]"),
    *(
        Wrong("compact", "index", lambda a, dtype=dtype: a["index"].to(dtype), f"index must be int32, got {str(dtype)[6:]}")
        for dtype in (torch.int64, torch.float32)
    ),
    Wrong("compact", "index", lambda a: a["index"][:1], "index must agree with x in batch and heads [2, 3, 20, 4], got shape [1, 3, 6]"),
    Wrong("compact", "index", lambda a: a["index"][:, :1], "index must agree with x in batch and heads [2, 3, 20, 4], got shape [2, 1, 6]"),
    Wrong("compact", "index", lambda a: _long(torch.int32)(a), "index must have at most 2147483647 columns, got 2147483648"),
    *(
        Wrong("compact", "index", lambda a, n=n: _with(a["index"], n), f"index must hold positions between 0 and 19, got {n}")
        for n in (-1, 20, 2**31 - 1, -(2**31))
    ),
]  # fmt: skip

# Memory is really there, but not on the machine's main device: only possible beside a device of another kind.
ELSEWHERE = [
    *(Wrong(op, "value", lambda a: a["value"].to("meta"), "value must be on the device of key (cpu), got meta")
      for op in ("compress", "compress_", "lag_score")),
    Wrong("compact", "index", lambda a: a["index"].to("meta"), "index must be on the device of x (cpu), got meta"),
]  # fmt: skip


def _with(index: Tensor, n: int) -> Tensor:
    index = index.clone()
    index[1, 2, 3] = n
    return index


def name_of(wrong: Wrong) -> str:
    return f"{wrong.op}-{wrong.text}"


def call(target: Callable, arguments: dict[str, Any]) -> Any:
    is_rows = "score" in arguments and isinstance(arguments["score"], Tensor)  # of topk_index
    positional = {"score"} if is_rows else {"sink_size"} if "source_table" in arguments else set()
    keywords = {name: x for name, x in arguments.items() if name in SCORING and name not in positional}
    return target(*[x for name, x in arguments.items() if name not in keywords], **keywords)


def assert_refused(target: Callable, wrong: Wrong, arguments: dict[str, Any]) -> None:
    """RuntimeError with exactly the text, and every tensor as it was."""
    small = {
        name: x
        for name, x in arguments.items()
        if isinstance(x, Tensor) and not x.is_meta and x.numel() < TOO_LONG
    }
    before = {name: x.clone() for name, x in small.items()}
    with pytest.raises(RuntimeError) as caught:
        call(target, arguments)
    assert str(caught.value).split("\n")[0] == wrong.message
    for name, x in small.items():
        assert torch.equal(bits(x), bits(before[name])), f"{name} was written"


def test_right_arguments_are_right(backend):
    for op in ARGUMENTS:
        call(getattr(backend, op), right(op, backend.device))


def reads_elements(wrong: Wrong) -> bool:
    """Only a look at the index tells; a kernel on a device cannot raise, it traps."""
    return "index must hold positions" in wrong.text


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_refused(registered_backend, wrong):
    if reads_elements(wrong) and registered_backend.runs_on_device:
        pytest.skip("an index out of range traps on CUDA, after which the process has no device")
    assert_refused(getattr(registered_backend, wrong.op), wrong, wrong.arguments(registered_backend.device))


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if reads_elements(wrong)], ids=name_of)
def test_a_kernel_traps_on_an_index_out_of_range(executor, wrong):
    """A kernel cannot raise: the executor reports a fault, a card an error of the launch."""
    with pytest.raises(AssertionError, match=r"trap.* compact_kernel, .*require_positions_in_range"):
        call(executor.compact, wrong.arguments())


@pytest.mark.parametrize("wrong", ELSEWHERE, ids=name_of)
def test_refused_on_another_device(registered_backend, wrong):
    if registered_backend.device.type != "cpu":
        pytest.skip("the meta device takes precedence over the device that is expected here")
    assert_refused(getattr(registered_backend, wrong.op), wrong, wrong.arguments())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
@pytest.mark.parametrize("op", ["compress", "compress_", "lag_score", "compact"])
def test_refused_between_cpu_and_cuda(op):
    name = ARGUMENTS[op][1]
    first = ARGUMENTS[op][0]
    for device, other in (("cpu", "cuda:0"), ("cuda:0", "cpu")):
        arguments = right(op, device)
        arguments[name] = arguments[name].to(other)
        wrong = Wrong(
            op, name, lambda a: None, f"{name} must be on the device of {first} ({device}), got {other}"
        )
        assert_refused(getattr(torch.ops.lagkv, op), wrong, arguments)


def traced(wrong: Wrong) -> Any:
    """Result or error of the fake kernel."""
    arguments = wrong.arguments()
    with FakeTensorMode() as mode:
        fakes = {id(x): mode.from_tensor(x) for x in arguments.values() if isinstance(x, Tensor)}
        return call(
            getattr(torch.ops.lagkv, wrong.op), {name: fakes.get(id(x), x) for name, x in arguments.items()}
        )


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_a_fake_kernel_refuses_what_decides_its_result(wrong):
    if not wrong.fake_refuses:
        traced(wrong)
        return
    with pytest.raises((RuntimeError, ValueError)) as caught:
        traced(wrong)
    # Sizes are refused by lagkv_ext.formulas, which knows no operator.
    assert str(caught.value).split("\n")[0] in (wrong.message, wrong.text)


def _once_per_argument() -> list[Wrong]:
    """Compiling takes a second: of every operator's wrong arguments the first of each text."""
    seen, chosen = set(), []
    for wrong in WRONG:
        kind = (wrong.op, wrong.argument, wrong.text.split(", got")[0])
        if kind not in seen and "2147483647" not in wrong.text:
            seen.add(kind)
            chosen.append(wrong)
    return chosen


@pytest.mark.parametrize("wrong", _once_per_argument(), ids=name_of)
def test_refused_when_compiled(wrong):
    """While tracing or when the graph runs; torch.compile wraps the error, the text is in it, and nothing was written."""
    torch._dynamo.reset()
    names = list(wrong.arguments())
    operator = getattr(torch.ops.lagkv, wrong.op)

    def function(*values: Any) -> Any:
        return call(operator, dict(zip(names, values, strict=True)))

    arguments = wrong.arguments()
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    with pytest.raises(RuntimeError) as caught:
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments.values())
    assert wrong.text in str(caught.value)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), f"{name} was written"


def test_misaligned_memory_is_refused(registered_backend):
    """Slices cannot be off the element size; foreign memory can."""
    memory = bytearray(2 * 3 * 20 * 4 * 4 + 64)
    start = next(
        n for n in range(1, 8) if (torch.frombuffer(memory, dtype=torch.uint8).data_ptr() + n) % 4 == 1
    )
    try:
        key = torch.frombuffer(memory, dtype=torch.float32, count=2 * 3 * 20 * 4, offset=start).view(
            2, 3, 20, 4
        )
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"torch makes no misaligned tensor here: {error}")
    if registered_backend.device.type != "cpu":
        pytest.skip("memory of the CPU")
    message = rf"key must be aligned to its element size \(4 bytes\), got address {key.data_ptr()}"
    with pytest.raises(RuntimeError, match=message):
        registered_backend.compress(key, key.clone(), 2, 4, 2)


def test_extreme_numbers_are_not_refused(backend):
    """A start or a partition beyond the sequence, however far, leaves it as it is."""
    x = torch.randn(1, 2, 20, 4, device=backend.device)
    for start, lag_size, keep in (
        (2**62, 4, 2),
        (0, 2**20, 2**20),
        (2**62, 2**20, 1),
        (20, 4, 2),
        (21, 4, 2),
        (2**31, 1, 1),
    ):
        key, value, index = backend.compress(x, x, start, lag_size, keep)
        assert torch.equal(key, x)
        assert torch.equal(value, x)
        assert torch.equal(index.cpu(), torch.arange(20, dtype=torch.int32).expand(1, 2, 20))
        y = x.clone()
        assert backend.compress_(y, x.clone(), start, lag_size, keep).shape == (1, 2, 20)
        assert torch.equal(y, x)
        assert backend.partition_bounds(x, start, lag_size).shape[2] == 0
        assert backend.lag_score(x, x, start, lag_size).numel() == 0


def test_unknown_instruction_set_is_refused():
    x = torch.randn(1, 1, 8, 4)
    for call_it in (torch.ops.lagkv._cpu_isa, lambda: torch.ops.lagkv.compress(x, x, 0, 2, 1)):
        with cpu_isa("sse9"), pytest.raises(RuntimeError, match=r"LAGKV_CPU_ISA must be .*got 'sse9'"):
            call_it()


PYTHON_WRONG = {
    "keep_ratio-0": ({"keep_ratio": 0.0}, ValueError, "keep_ratio must be in (0, 1], got 0.0"),
    "keep_ratio-above-1": ({"keep_ratio": 1.5}, ValueError, "keep_ratio must be in (0, 1], got 1.5"),
    "keep_ratio-nan": ({"keep_ratio": math.nan}, ValueError, "keep_ratio must be in (0, 1], got nan"),
    "both": ({"keep_ratio": 0.5, "keep": 2}, ValueError, "give keep or keep_ratio, not both; got keep=2 and keep_ratio=0.5"),
    "keep": ({"keep": 9}, RuntimeError, "lagkv::{op}: keep must be at most lag_size (8), got 9"),
    "lag_size": ({"lag_size": 0, "keep": 1}, RuntimeError, "lagkv::{op}: lag_size must be at least 1, got 0"),
    "lag_size of a ratio": ({"lag_size": 0}, ValueError, "lag_size must be at least 1, got 0"),
    "sink_size": ({"sink_size": -1}, RuntimeError, "lagkv::{op}: start must be at least 0, got -1"),
    "score": ({"score": "mean"}, RuntimeError, "lagkv::{op}: score must be 'std', 'cosine' or 'blend', got 'mean'"),
    "value_weight": ({"value_weight": math.inf}, RuntimeError, "lagkv::{op}: value_weight must be finite, got inf"),
}  # fmt: skip


@pytest.mark.parametrize("op", ["compress", "compress_"])
@pytest.mark.parametrize("wrong", PYTHON_WRONG)
def test_python_functions_refuse(op, wrong):
    change, error, text = PYTHON_WRONG[wrong]
    key, value = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    before = key.clone(), value.clone()
    with pytest.raises(error) as caught:
        getattr(lagkv_ext, op)(key, value, **{"lag_size": 8, "sink_size": 2, **change})
    assert str(caught.value).split("\n")[0] == text.format(op=op)
    assert torch.equal(key, before[0])
    assert torch.equal(value, before[1])
