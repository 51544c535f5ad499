"""Gradients: they scatter back to the kept rows, add up where a row was taken twice, and the choice has none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import lagkv_ext
from lagkv_ext import reference
from tests.ops.backends import Backend
from tests.ops.cases import cases

SIZES = {"start": 2, "lag_size": 5, "keep": 2}


def pair(
    *, length: int = 2 + 3 * 5 + 3, dtype: torch.dtype = torch.float64, device="cpu"
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, length, 2, generator=generator, dtype=dtype).to(device)
    value = torch.randn(2, 2, length, 3, generator=generator, dtype=dtype).to(device)
    return key.requires_grad_(), value.requires_grad_()


@pytest.mark.parametrize("score", ["std", "cosine"])
def test_gradcheck_compress(registered_backend, score):
    key, value = pair(device=registered_backend.device)
    # Rows are only copied: a step of 1e-6 does not change which, as the scores are further apart.
    torch.autograd.gradcheck(
        lambda k, v: registered_backend.compress(k, v, **SIZES, score=score)[:2],
        (key, value),
        fast_mode=False,
    )
    torch.autograd.gradgradcheck(
        lambda k, v: registered_backend.compress(k, v, **SIZES, score=score)[:2], (key, value)
    )


def test_gradcheck_compact(registered_backend):
    key, _ = pair(device=registered_backend.device)
    index = torch.tensor([[[3, 3, 0, 19], [1, 1, 1, 1]], [[19, 0, 5, 5], [2, 4, 6, 8]]], dtype=torch.int32)
    index = index.to(registered_backend.device)
    torch.autograd.gradcheck(lambda x: registered_backend.compact(x, index), (key,))
    torch.autograd.gradgradcheck(lambda x: registered_backend.compact(x, index), (key,))


@given(case=cases(kinds=("normal", "ties"), compresses=True, expanded=False))
def test_gradients_are_the_references(registered_backend, case):
    """Any layout and dtype, gradients of one output or of both."""
    grads = []
    for backend in (registered_backend, Backend("reference", reference)):
        key, value = (
            placed.view.detach().requires_grad_() for placed in case.make(registered_backend.device)
        )
        arguments = (case.start, case.lag_size, case.keep)
        if backend is registered_backend:
            index = backend.compress(key, value, *arguments, **case.scoring)[2]
        new_key, new_value = backend.compact(key, index), backend.compact(value, index)
        if backend is registered_backend:
            new_key, new_value, again = backend.compress(key, value, *arguments, **case.scoring)
            assert torch.equal(again, index)
        weight = torch.arange(new_key.shape[2], device=key.device, dtype=key.dtype)[:, None]
        ((new_key * weight).sum() + (2 * new_value).sum()).backward()
        grads.append((key.grad, value.grad))
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    kept = torch.zeros(case.batch, case.heads, case.length, device=index.device).scatter(2, index.long(), 2.0)
    assert torch.equal(grads[0][1].float(), kept.unsqueeze(-1).expand_as(grads[0][1]))


def test_dropped_rows_get_zero_and_kept_rows_their_gradient(registered_backend):
    key, value = pair(device=registered_backend.device)
    new_key, _, index = registered_backend.compress(key, value, **SIZES)
    grad_key = torch.randn_like(new_key)
    (new_key * grad_key).sum().backward()
    assert value.grad is None or not value.grad.any()
    for b in range(2):
        for h in range(2):
            kept = index[b, h].tolist()
            assert torch.equal(key.grad[b, h, kept], grad_key[b, h])
            dropped = sorted(set(range(key.shape[2])) - set(kept))
            assert len(dropped) == 2 * (5 - 2)
            assert not key.grad[b, h, dropped].any()


def test_used_twice_the_gradients_add_up(registered_backend):
    key, value = pair(device=registered_backend.device)
    first = registered_backend.compress(key, value, **SIZES)
    second = registered_backend.compress(key, value, **SIZES)
    (first[0].sum() + 3 * second[0].sum() + first[1].sum()).backward()
    assert set(key.grad.unique().tolist()) == {0.0, 4.0}
    assert set(value.grad.unique().tolist()) == {0.0, 1.0}


def test_through_a_compression_of_a_compression(registered_backend):
    key, value = pair(device=registered_backend.device)
    once = registered_backend.compress(key, value, **SIZES)
    start = lagkv_ext.next_start(key.shape[2], **SIZES)
    grown = [torch.cat([x, x[:, :, -5:] * 2], dim=2) for x in once[:2]]
    twice = registered_backend.compress(*grown, start, SIZES["lag_size"], SIZES["keep"])
    assert twice[0].shape[2] < grown[0].shape[2]
    (twice[0].sum() + twice[1].sum()).backward()
    for x, new in ((key, twice[0]), (value, twice[1])):
        assert x.grad.sum() > 0
        assert x.grad.max() <= 3  # once as it is, once doubled
        assert new.requires_grad


def test_the_choice_has_no_gradient(registered_backend):
    key, value = pair(device=registered_backend.device)
    arguments = (SIZES["start"], SIZES["lag_size"])
    scores = registered_backend.lag_score(key, value, *arguments)
    outputs = {
        "index": registered_backend.compress(key, value, **SIZES)[2],
        "lag_score": scores,
        "partition_bounds": registered_backend.partition_bounds(key, *arguments),
        "topk_index": registered_backend.topk_index(scores, 2),
    }
    for name, x in outputs.items():
        assert not x.requires_grad, name


def test_only_what_requires_grad_gets_one(registered_backend):
    key, value = pair(device=registered_backend.device)
    new_key, _, _ = registered_backend.compress(key, value.detach(), **SIZES)
    new_key.sum().backward()
    assert key.grad.any()
    assert value.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording(registered_backend, mode):
    key, value = pair(device=registered_backend.device)
    expected = registered_backend.compress(key, value, **SIZES)
    with mode():
        actual = registered_backend.compress(key, value, **SIZES)
        copies = key.clone(), value.clone()
        index = registered_backend.compress_(*copies, **SIZES)
        assert torch.equal(registered_backend.compact(key, index), expected[0])
    for mine, its in zip(actual, expected, strict=True):
        assert not mine.requires_grad
        assert torch.equal(mine, its)
    assert torch.equal(copies[0][:, :, : index.shape[2]], expected[0])


def test_in_place_bumps_the_version(registered_backend):
    """Autograd must see that the tensors changed: what was saved before is refused afterwards."""
    key, value = (x.detach() for x in pair(device=registered_backend.device))
    versions = key._version, value._version
    registered_backend.compress_(key, value, **SIZES)
    assert key._version > versions[0]
    assert value._version > versions[1]
    weight = torch.ones_like(key, requires_grad=True)
    product = weight * key
    registered_backend.compress_(key, value, **SIZES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_the_reference_is_differentiable():
    key, value = pair()
    torch.autograd.gradcheck(lambda k, v: reference.compress(k, v, **SIZES)[:2], (key, value), fast_mode=True)
