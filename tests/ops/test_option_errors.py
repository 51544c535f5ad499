"""Every wrong option and every wrong tensor of scores is refused with one text, and nothing is written."""

# ruff: noqa: E501  (tables: one wrong argument a line)

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lagkv_ext
from tests.ops import test_errors, test_ragged_errors
from tests.ops.cases import bits
from tests.ops.test_errors import TOO_LONG, traced
from tests.ops.test_ragged_errors import numbers

COMPRESS = ("compress", "compress_", "compress_ragged_", "compress_varlen", "compress_paged_")
SCORED = {"compress_": (2, 3, 20), "compress_ragged_": (2, 3, 22), "compress_paged_": (9, 4, 3)}
DIMS = {
    "compress_": ("batch", "heads", "tokens"),
    "compress_ragged_": ("batch", "heads", "capacity"),
    "compress_paged_": ("blocks", "block_size", "heads"),
}
KEY = {"compress_": "key", "compress_ragged_": "key", "compress_paged_": "key_cache"}


def right(op: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments with which ``op`` works, one budget for a head and scores where it takes them."""
    if op == "compress_carried":
        arguments = test_errors.right("compress", device)
        carried = torch.zeros(2, 3, 1, device=device)
        return {
            **{name: arguments[name] for name in ("key", "value")},
            "carried": carried,
            **{name: arguments[name] for name in ("start", "lag_size", "keep")},
        }
    if op in test_ragged_errors.ARGUMENTS:
        arguments = test_ragged_errors.right(op, device)
    else:
        arguments = test_errors.right(op, device)
    if op in COMPRESS:
        arguments["budget"] = "head"
    if op in SCORED:
        arguments |= {"scores": torch.zeros(SCORED[op], device=device), "sink_size": 1}
    return arguments


@dataclasses.dataclass(frozen=True)
class Wrong:
    """``change`` gives what is other than in the right arguments; ``text`` is all after ``lagkv::op:``."""

    op: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    text: str

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        arguments = right(self.op, device)
        return arguments | self.change(arguments)

    @property
    def message(self) -> str:
        return f"lagkv::{self.op}: {self.text}"

    @property
    def fake_refuses(self) -> bool:
        """The shape, dtype or device of the result depends on the argument."""
        return self.text.startswith(("carried must have 3", "carried must be float"))


def _fixed(**change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda a: change


def _wrong_scores(op: str) -> list[Wrong]:
    shape, key = list(SCORED[op]), KEY[op]
    found = [
        Wrong(op, lambda a: {"scores": a["scores"][0]}, f"scores must have 3 dimensions, got shape {shape[1:]}"),
        Wrong(op, lambda a: {"scores": a["scores"].double()}, f"scores must be float32 where {key} is float32, got float64"),
        Wrong(op, lambda a: {"scores": a["scores"].half()}, f"scores must be float32 where {key} is float32, got float16"),
        Wrong(op, _fixed(budget="partition"), f"scores must not be given with budget='partition', which carries none, got shape {shape}"),
        Wrong(op, _fixed(sink_size=-1), "sink_size must be at least 0, got -1"),
        Wrong(op, _fixed(scores=None), "sink_size must be 0 where no scores are given, got 1"),
    ]  # fmt: skip
    for dim, name in enumerate(DIMS[op]):
        smaller = [n - (d == dim) for d, n in enumerate(shape)]
        found.append(Wrong(op, lambda a, dim=dim: {"scores": a["scores"].narrow(dim, 0, shape[dim] - 1)}, f"scores must agree with {key} in {name} {[*shape, 4]}, got shape {smaller}"))  # fmt: skip
    return found


WRONG = [
    *(
        Wrong(op, _fixed(smooth=n), f"smooth must be odd and at least 1, got {n}")
        for op in (*COMPRESS, "compress_carried", "lag_score")
        for n in (0, 2, -1, 2**40)
    ),
    *(
        Wrong(op, _fixed(score="median"), "score must be 'std', 'cosine' or 'blend', got 'median'")
        for op in (*COMPRESS, "compress_carried", "lag_score")
    ),
    *(
        Wrong(op, _fixed(budget=budget), f"budget must be 'partition' or 'head', got '{budget}'")
        for op in COMPRESS
        for budget in ("", "Head", "layer")
    ),
    *(wrong for op in SCORED for wrong in _wrong_scores(op)),
    Wrong("compress_", _fixed(sink_size=3), "sink_size must be at most start (2), got 3"),
    Wrong("compress_carried", lambda a: {"carried": a["carried"][0]}, "carried must have 3 dimensions [B, H, C], got shape [3, 1]"),
    Wrong("compress_carried", lambda a: {"carried": a["carried"].double()}, "carried must be float32 where key is float32, got float64"),
    Wrong("compress_carried", lambda a: {"key": a["key"].double(), "value": a["value"].double()}, "carried must be float64 where key is float64, got float32"),
    Wrong("compress_carried", lambda a: {"carried": a["carried"][:1]}, "carried must agree with key in batch and heads [2, 3, 20, 4], got shape [1, 3, 1]"),
    Wrong("compress_carried", lambda a: {"carried": a["carried"].expand(2, 3, 3)}, "carried must have at most start (2) columns, got 3"),
    Wrong("compress_carried", _fixed(start=-1), "start must be at least 0, got -1"),
    Wrong("compress_carried", _fixed(keep=5), "keep must be at most lag_size (4), got 5"),
]  # fmt: skip


def name_of(wrong: Wrong) -> str:
    return f"{wrong.op}-{wrong.text}"


def assert_refused(target: Callable, wrong: Wrong, arguments: dict[str, Any]) -> None:
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and not x.is_meta}
    before = {name: x.clone() for name, x in tensors.items() if x.numel() < TOO_LONG}
    with pytest.raises(RuntimeError) as caught:
        test_errors.call(target, arguments)
    assert str(caught.value).split("\n")[0] == wrong.message
    for name, x in before.items():
        assert torch.equal(bits(tensors[name]), bits(x)), f"{name} was written"


@pytest.mark.parametrize("op", [*COMPRESS, "compress_carried", "lag_score"])
def test_right_arguments_are_right(backend, op):
    test_errors.call(getattr(backend, op), right(op, backend.device))


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_refused(registered_backend, wrong):
    assert_refused(getattr(registered_backend, wrong.op), wrong, wrong.arguments(registered_backend.device))


@pytest.mark.parametrize(
    ("op", "name"), [*((op, "scores") for op in SCORED), ("compress_carried", "carried")]
)
def test_refused_on_another_device(op, name):
    of = KEY.get(op, "key")
    wrong = Wrong(
        op, lambda a: {name: a[name].to("meta")}, f"{name} must be on the device of {of} (cpu), got meta"
    )
    assert_refused(getattr(torch.ops.lagkv, op), wrong, wrong.arguments())


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_a_fake_kernel_refuses_what_decides_its_result(wrong):
    sizes = wrong.text.startswith(("start must", "keep must"))
    if not wrong.fake_refuses and not sizes:
        traced(wrong)
        return
    with pytest.raises((RuntimeError, ValueError)) as caught:
        traced(wrong)
    # Sizes are refused by lagkv_ext.formulas, which knows no operator.
    assert str(caught.value).split("\n")[0] in (wrong.message, wrong.text)


@pytest.mark.parametrize("wrong", [w for w in WRONG if w.op == "compress_"], ids=name_of)
def test_refused_when_compiled(wrong):
    torch._dynamo.reset()
    arguments = wrong.arguments()
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}

    def function(arguments: dict[str, Any]) -> Tensor:
        return test_errors.call(torch.ops.lagkv.compress_, arguments)

    with pytest.raises(RuntimeError) as caught:
        torch.compile(function, fullgraph=True, backend="aot_eager")(arguments)
    assert wrong.text in str(caught.value)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), f"{name} was written"


@pytest.mark.parametrize("op", SCORED)
def test_scores_share_memory_with_nothing(op):
    arguments = right(op)
    expanded = torch.zeros(1, 1, 1).expand(SCORED[op])
    text = rf"lagkv::{op}: scores must not overlap itself"
    with pytest.raises(RuntimeError, match=text):
        test_errors.call(getattr(torch.ops.lagkv, op), arguments | {"scores": expanded})
    key = arguments[KEY[op]]
    inside = key[..., 0]
    assert inside.shape == SCORED[op]
    before = key.clone()
    with pytest.raises(RuntimeError, match=rf"lagkv::{op}: scores must not overlap {KEY[op]}, got addresses"):
        test_errors.call(getattr(torch.ops.lagkv, op), arguments | {"scores": inside})
    assert torch.equal(key, before)


SHARED = r"block_table must not hold a block twice that is written, got block 8 at \[0, 0\] and \[1, 0\]"


@pytest.mark.parametrize("op", ["compress_ragged_", "compress_paged_"])
def test_keeping_none_needs_scores(registered_backend, op):
    arguments = right(op, registered_backend.device) | {"keep": 0}
    test_errors.call(getattr(registered_backend, op), arguments)
    for change, least in (({"scores": None, "sink_size": 0}, 1), ({"keep": -1}, 0)):
        with pytest.raises(RuntimeError, match=f"lagkv::{op}: keep must be at least {least}, got"):
            test_errors.call(getattr(registered_backend, op), arguments | change)


def test_pages_of_rows_that_compete_must_not_be_shared(registered_backend):
    """Their rows before start move, and their scores are written: a page there is nobody else's."""
    device, operator = registered_backend.device, registered_backend.compress_paged_

    def validated(*arguments: Any, **options: Any) -> Tensor:
        """A device tells on request alone."""
        *rows, lag_size, keep = arguments
        return lagkv_ext.compress_paged_(*rows, lag_size=lag_size, keep=keep, **options, validate=True)

    target = validated if registered_backend.runs_on_device else operator
    # Both begin with page 8, which holds rows 0 .. 3; both start at row 4.
    table = numbers([8, 0, 7, 2, 5], [8, 4, 6, -1, -1]).to(device)
    shared = right("compress_paged_", device) | {"block_table": table}
    test_errors.call(target, shared | {"start": numbers(4, 4).to(device), "sink_size": 4})
    for change in ({"sink_size": 3}, {"sink_size": 3, "keep": 4}):
        arguments = right("compress_paged_", device) | {"block_table": table} | change
        arguments["start"] = numbers(4, 4).to(device)
        before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
        with pytest.raises(RuntimeError, match=SHARED):
            test_errors.call(target, arguments)
        for name, x in before.items():
            assert torch.equal(arguments[name], x), f"{name} was written"


def test_copied_numbers_of_rows_that_compete_are_refused():
    """Path of validate=True on a device, from the copy to the host on."""
    table, length = numbers([8, 0, 7, 2, 5], [8, 4, 6, -1, -1]), right("compress_paged_")["length"]
    pages = (table, numbers(4, 4), length, 4, 2, 9, 4)
    torch.ops.lagkv._check_pages(*pages)
    torch.ops.lagkv._check_pages(*pages, True, 4)
    with pytest.raises(RuntimeError, match=SHARED):
        torch.ops.lagkv._check_pages(*pages, True, 3)


PYTHON_WRONG = {
    "smooth": ({"smooth": 2}, RuntimeError, "lagkv::{op}: smooth must be odd and at least 1, got 2"),
    "budget": ({"budget": "layer"}, RuntimeError, "lagkv::{op}: budget must be 'partition' or 'head', got 'layer'"),
    "smooth of a wrong type": ({"smooth": 3.0}, TypeError, "smooth must be an integer, got 3.0"),
    "budget of a wrong type": ({"budget": None}, TypeError, "budget must be a string, got None"),
}  # fmt: skip


@pytest.mark.parametrize("op", ["compress", "compress_"])
@pytest.mark.parametrize("wrong", PYTHON_WRONG)
def test_python_functions_refuse(op, wrong):
    change, error, text = PYTHON_WRONG[wrong]
    key, value = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    with pytest.raises(error) as caught:
        getattr(lagkv_ext, op)(key, value, **{"lag_size": 8, "sink_size": 2, **change})
    assert str(caught.value).split("\n")[0] == text.format(op=op)


@pytest.mark.parametrize("scores", [1.0, [1.0], "scores"])
def test_scores_must_be_a_tensor(scores):
    x = torch.randn(1, 1, 40, 4)
    with pytest.raises(TypeError, match="scores must be a tensor, got "):
        lagkv_ext.compress_(x, x.clone(), lag_size=8, budget="head", scores=scores)
    with pytest.raises(TypeError, match="carried must be a tensor, got "):
        lagkv_ext.compress_carried(x, x.clone(), scores, lag_size=8)
