"""Gradients of packed rows, and versions of what the in-place operators write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.ragged_cases import RaggedCase
from tests.ops.test_ragged_errors import right

SIZES = (5, 2)
LENGTHS = (17, 0, 8, 23)


def packed(device: torch.device, spare: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS) + spare
    key, value = (
        torch.randn(rows, 2, dim, generator=generator, dtype=torch.float64).to(device) for dim in (2, 3)
    )
    case = RaggedCase(tuple((2, n) for n in LENGTHS))
    return (
        key.requires_grad_(),
        value.requires_grad_(),
        case.cu_seqlens(device),
        case.numbers(device)[0],
    )


def test_gradcheck(registered_backend):
    key, value, cu_seqlens, start = packed(registered_backend.device)

    def rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = registered_backend.compress_varlen(k, v, cu_seqlens, start, *SIZES)
        return out[0][: int(out[3][-1])], out[1][: int(out[3][-1])]

    torch.autograd.gradcheck(rows, (key, value), check_forward_ad=True)
    torch.autograd.gradgradcheck(rows, (key, value), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_the_gradient_is_that_of_each_sequence_alone(registered_backend):
    key, value, cu_seqlens, start = packed(registered_backend.device)
    out = registered_backend.compress_varlen(key, value, cu_seqlens, start, *SIZES)
    total = int(out[3][-1])
    weight = torch.arange(1.0, total + 1, dtype=torch.float64, device=key.device)[:, None, None]
    ((out[0][:total] * weight).sum() + (out[1][:total] * weight * 2).sum()).backward()
    packed_grads = key.grad, value.grad
    for b in range(len(LENGTHS)):
        rows, new_rows = (slice(int(ends[b]), int(ends[b + 1])) for ends in (cu_seqlens, out[3]))
        pair = [x.detach()[rows].transpose(0, 1)[None].requires_grad_() for x in (key, value)]
        alone = registered_backend.compress(*pair, 2, *SIZES)
        of_rows = weight[new_rows].transpose(0, 1)
        ((alone[0] * of_rows).sum() + (alone[1] * of_rows * 2).sum()).backward()
        for mine, x in zip(packed_grads, pair, strict=True):
            assert torch.equal(mine[rows], x.grad[0].transpose(0, 1))
    assert not packed_grads[0][int(cu_seqlens[-1]) :].any()


def test_a_gradient_of_rows_that_are_not_valid_goes_nowhere(registered_backend):
    """The rows past the new ones are unspecified, and so is what arrives for them: even NaN."""
    key, value, cu_seqlens, start = packed(registered_backend.device)
    out = registered_backend.compress_varlen(key, value, cu_seqlens, start, *SIZES)
    grad = torch.full_like(out[0], torch.nan)
    grad[: int(out[3][-1])] = 1
    out[0].backward(grad)
    kept = sum(2 + 2 * (max(0, (n - 2) // 5 - 1)) + n - 2 - 5 * max(0, (n - 2) // 5 - 1) for n in (17, 8, 23))
    assert key.grad.sum() == 2 * 2 * kept
    assert set(key.grad.unique().tolist()) == {0.0, 1.0}
    assert value.grad is None or not value.grad.any()
    assert not any(x.requires_grad for x in out[2:])


@pytest.mark.parametrize("op", ["compress_ragged_", "compress_paged_"])
def test_in_place_bumps_the_versions(registered_backend, op):
    arguments = right(op, registered_backend.device)
    before = {name: x._version for name, x in arguments.items() if isinstance(x, Tensor)}
    getattr(registered_backend, op)(*arguments.values())
    for name, version in before.items():
        written = name != "block_table"
        assert (arguments[name]._version > version) is written, name
