"""Checks of scalar arguments: an error names the argument, what it must be, and what it got.

A wrong type is a TypeError, a value out of range a ValueError. A symbolic number (``torch.compile``, ``torch.export``)
passes unseen, so that no check becomes a guard; the operators check such numbers when the graph runs.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

#: Scores of the operators (spec, sections 1 and 2).
SCORES = ("std", "cosine", "blend")
#: Budgets of the operators (docs/method.md, section 2).
BUDGETS = ("partition", "head")
#: Storage types of keys and values.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Tokens of a sequence; positions are int32.
MAX_LENGTH = 2**31 - 1


def integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """``value`` as an int in ``[minimum, maximum]``. No float, bool or tensor is one; an integer of NumPy is."""
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value  # type: ignore[return-value]
        try:
            if isinstance(value, (bool, torch.Tensor)):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {described(value)}") from None
    if is_dynamo_compiling():
        return value
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """``value`` as a float. A string, bool or tensor is none; a number of NumPy is."""
    if type(value) is float:
        return value
    try:
        if isinstance(value, (bool, str, bytes, torch.Tensor)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number, got {described(value)}") from None


def finite(name: str, value: Any) -> float:
    """``value`` as a float that is neither NaN nor infinite."""
    found = number(name, value)
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {value}")
    return found


def ratio(name: str, value: Any) -> float:
    """``value`` as a float in ``(0, 1]``."""
    found = number(name, value)
    if not 0.0 < found <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return found


def smoothing(name: str, value: Any) -> int:
    """``value`` as an odd int from 1 on."""
    found = integer(name, value, minimum=1)
    if found % 2 == 0:
        raise ValueError(f"{name} must be odd, got {value}")
    return found


def boolean(name: str, value: Any) -> bool:
    """``value``, which must be True or False and nothing that is merely true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {described(value)}")
    return value


def text(name: str, value: Any) -> str:
    """``value``, which must be a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {described(value)}")
    return value


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """``value``, which must be one of the strings ``allowed``."""
    if text(name, value) not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
    return value


def tensor(name: str, value: Any) -> torch.Tensor:
    """``value``, which must be a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(value)}")
    return value


def path(name: str, value: Any) -> str:
    """``value``, a string or an `os.PathLike`, as a string."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(found := os.fspath(value), str):
        raise TypeError(f"{name} must be a path (a string or an os.PathLike), got {described(value)}")
    return found


def device(name: str, value: Any) -> torch.device:
    """``value``, a `torch.device` or the name of one."""
    try:
        if not isinstance(value, (str, torch.device)):
            raise TypeError
        return torch.device(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be a torch.device or the name of one, got {described(value)}") from None


def storage_type(name: str, value: Any) -> torch.dtype | None:
    """``value``, a dtype that rows may have, or None."""
    if value is not None and value not in FLOATING:
        raise TypeError(f"{name} must be one of {', '.join(map(str, FLOATING))}, got {described(value)}")
    return value


def indices(name: str, value: Any) -> torch.Tensor:
    """``value``, which must be a tensor ``[count]`` of integers."""
    if (
        tensor(name, value).dim() != 1
        or value.is_floating_point()
        or value.is_complex()
        or value.dtype == torch.bool
    ):
        raise ValueError(
            f"{name} must be integers [count], got shape {list(value.shape)}, dtype {value.dtype}"
        )
    return value


def described(value: Any) -> str:
    """A wrong argument for an error message: short, and without reading a tensor's data."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"
