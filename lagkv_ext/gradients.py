"""Derivatives of the operators: right in every mode of differentiation, or refused.

- ``compress``, ``compress_carried``, ``compact``, ``compress_varlen`` copy rows, so where a derivative is asked for,
  the rows are gathered once more by PyTorch, at the index that the operator chose: backward and forward mode, double
  backward and ``torch.func`` are then PyTorch's own. The choice of rows has no derivative, and carried scores none that
  is implemented.
- ``lag_score`` and ``partition_bounds`` have none that is implemented. Backward through their results raises;
  forward mode and ``torch.func`` are refused at the call. ``detach`` their inputs.
- The operators in place refuse a tensor whose derivative is recorded, and tell autograd of everything they write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lagkv_ext import _library

assert _library  # loading the libraries defines torch.ops.lagkv

_implementations = torch.library.Library("lagkv", "IMPL")  # lives as long as its kernels are registered


def _recorded(*tensors: Tensor) -> bool:
    """Backward mode asks for the derivative by one of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _dual(*tensors: Tensor) -> bool:
    """Forward mode does. Outside a dual level, where every call of a server is, that costs one comparison."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def _below_autograd(operator: Any, keyset: Any, *arguments: Any, **method: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **method)


def _compress(keyset: Any, key: Tensor, value: Tensor, *sizes: int, **method: Any) -> Any:
    result = _below_autograd(torch.ops.lagkv.compress.default, keyset, key, value, *sizes, **method)
    if not (_recorded(key, value) or _dual(key, value)):
        return result
    index = result[2]
    return _rows_at(key, index), _rows_at(value, index), index


def _compress_carried(
    keyset: Any, key: Tensor, value: Tensor, carried: Tensor, *sizes: int, **method: Any
) -> Any:
    operator = torch.ops.lagkv.compress_carried.default
    if _recorded(carried) or _dual(carried):
        raise RuntimeError(_no_derivative("compress_carried"))
    result = _below_autograd(operator, keyset, key, value, carried, *sizes, **method)
    if not (_recorded(key, value) or _dual(key, value)):
        return result
    index = result[2]
    return _rows_at(key, index), _rows_at(value, index), *result[2:]


def _compact(keyset: Any, x: Tensor, index: Tensor) -> Tensor:
    rows = _below_autograd(torch.ops.lagkv.compact.default, keyset, x, index)
    return _rows_at(x, index) if _recorded(x) or _dual(x) else rows


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, h, index[b, h, i]]``: not torch.gather, which on the CPU rewrites the bits of a bfloat16 NaN."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    head = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[batch, head, index.long()]


def _compress_varlen(
    keyset: Any, key: Tensor, value: Tensor, cu_seqlens: Tensor, start: Tensor, *sizes: int, **method: Any
) -> Any:
    operator = torch.ops.lagkv.compress_varlen.default
    result = _below_autograd(operator, keyset, key, value, cu_seqlens, start, *sizes, **method)
    if not (_recorded(key, value) or _dual(key, value)):
        return result
    new_key, new_value, index, new_cu_seqlens, new_start = result
    # [T, H]: the row that every output row was, and whether it was any.
    position = index.transpose(0, 1)
    row = torch.arange(position.shape[0], device=index.device, dtype=torch.int32)
    sequence = torch.searchsorted(
        new_cu_seqlens[1:], row, right=True
    )  # past the last: B, which cu_seqlens has
    kept = position >= 0
    source = torch.where(kept, cu_seqlens[sequence].unsqueeze(1) + position, 0).long()
    head = torch.arange(position.shape[1], device=index.device)
    new_key, new_value = (
        torch.where(kept.unsqueeze(-1), x[source, head], new)
        for x, new in ((key, new_key), (value, new_value))
    )
    return new_key, new_value, index, new_cu_seqlens, new_start


class _NoDerivative(torch.autograd.Function):
    """Calls ``function`` on the tensors; going backward through the result raises."""

    @staticmethod
    def forward(ctx: Any, name: str, function: Any, *tensors: Tensor) -> Any:
        ctx.name = name
        return function()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_no_derivative(ctx.name))


def _no_derivative(name: str) -> str:
    return f"lagkv::{name}: the result has no gradient (derivative); call it with detached tensors"


def _register_without_derivative(name: str, tensors: int) -> None:
    """Registers ``name``, whose first ``tensors`` arguments can be differentiated by."""
    operator = getattr(torch.ops.lagkv, name).default

    def kernel(keyset: Any, *arguments: Any, **method: Any) -> Any:
        inputs = arguments[:tensors]
        recorded, dual = _recorded(*inputs), _dual(*inputs)
        if not recorded and not dual:
            return _below_autograd(operator, keyset, *arguments, **method)
        if dual or torch._C._are_functorch_transforms_active():
            raise RuntimeError(_no_derivative(name))
        return _NoDerivative.apply(
            name, lambda: _below_autograd(operator, keyset, *arguments, **method), *inputs
        )

    _implementations.impl(name, kernel, "Autograd", with_keyset=True)


def _register_in_place(name: str, **written: int) -> None:
    """The operator ``name`` writes the arguments ``written`` (their names and positions), and ``scores`` if given."""
    operator = getattr(torch.ops.lagkv, name).default

    def kernel(keyset: Any, *arguments: Any, **method: Any) -> Any:
        tensors = [arguments[position] for position in written.values()]
        names = list(written)
        if (scores := method.get("scores")) is not None:
            tensors.append(scores)
            names.append("scores")
        if _recorded(*tensors):
            refuse(
                _recorded,
                names,
                tensors,
                "require grad",
                "requires_grad=True; use torch.no_grad(), or detach it",
            )
        if _dual(*tensors):
            refuse(_dual, names, tensors, "carry a gradient of forward mode", "a dual tensor")
        # Autograd would use what it saved of the old rows without an error.
        torch.autograd.graph.increment_version(tensors)
        return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments, **method)

    def refuse(is_wrong: Any, names: list[str], tensors: list[Tensor], verb: str, got: str) -> None:
        argument = next(argument for argument, x in zip(names, tensors, strict=True) if is_wrong(x))
        raise RuntimeError(
            f"lagkv::{name}: {argument} must not {verb} (the operator works in place), got {got}"
        )

    _implementations.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_implementations.impl("compress", _compress, "Autograd", with_keyset=True)
_implementations.impl("compress_carried", _compress_carried, "Autograd", with_keyset=True)
_implementations.impl("compact", _compact, "Autograd", with_keyset=True)
_implementations.impl("compress_varlen", _compress_varlen, "Autograd", with_keyset=True)
_register_without_derivative("lag_score", 2)
_register_without_derivative("partition_bounds", 1)
_register_in_place("compress_", key=0, value=1)
_register_in_place("compress_ragged_", key=0, value=1, start=2, length=3)
_register_in_place("compress_paged_", key_cache=0, value_cache=1, start=3, length=4)
_register_in_place("compress_blocks", key_cache=0, value_cache=1)
