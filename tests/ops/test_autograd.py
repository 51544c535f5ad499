"""Gradients in every mode: they go back to the kept rows, add up where a row was taken twice; the choice has none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd import forward_ad

import lagkv_ext
from lagkv_ext import reference
from tests.ops import test_blocks_errors, test_errors, test_option_errors, test_ragged_errors
from tests.ops.backends import Backend, cpu_isa
from tests.ops.cases import cases

SIZES = {"start": 2, "lag_size": 5, "keep": 2}


def pair(
    *, length: int = 2 + 3 * 5 + 3, dtype: torch.dtype = torch.float64, device="cpu"
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, length, 2, generator=generator, dtype=dtype).to(device)
    value = torch.randn(2, 2, length, 3, generator=generator, dtype=dtype).to(device)
    return key.requires_grad_(), value.requires_grad_()


EVERY_MODE = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
TWICE = {"check_fwd_over_rev": True, "check_rev_over_rev": True}


@pytest.mark.parametrize("score", ["std", "cosine"])
def test_gradcheck_compress(registered_backend, score):
    key, value = pair(device=registered_backend.device)

    # Rows are only copied: a step of 1e-6 does not change which, as the scores are further apart.
    def rows(k, v):
        return registered_backend.compress(k, v, **SIZES, score=score)[:2]

    torch.autograd.gradcheck(rows, (key, value), fast_mode=False, **EVERY_MODE)
    torch.autograd.gradgradcheck(rows, (key, value), **TWICE)


def test_gradcheck_compact(registered_backend):
    key, _ = pair(device=registered_backend.device)
    index = torch.tensor([[[3, 3, 0, 19], [1, 1, 1, 1]], [[19, 0, 5, 5], [2, 4, 6, 8]]], dtype=torch.int32)
    index = index.to(registered_backend.device)
    torch.autograd.gradcheck(lambda x: registered_backend.compact(x, index), (key,), **EVERY_MODE)
    torch.autograd.gradgradcheck(lambda x: registered_backend.compact(x, index), (key,), **TWICE)


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


def test_gradcheck_compress_carried(registered_backend):
    key, value = pair(device=registered_backend.device)
    carried = torch.randn(2, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    carried = carried.to(registered_backend.device)

    def rows(k, v):
        return registered_backend.compress_carried(k, v, carried, 3, 4, 2, score="blend")[:2]

    torch.autograd.gradcheck(rows, (key, value), fast_mode=False, **EVERY_MODE)
    torch.autograd.gradgradcheck(rows, (key, value), **TWICE)
    result = registered_backend.compress_carried(key, value, carried, 3, 4, 2)
    assert [x.requires_grad for x in result] == [True, True, False, False]


def test_a_gradient_of_carried_scores_is_refused():
    key, value = (x.detach() for x in pair())
    carried = torch.zeros(2, 2, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="lagkv::compress_carried: the result has no gradient"):
        torch.ops.lagkv.compress_carried(key, value, carried, 3, 4, 2)
    with torch.no_grad():
        torch.ops.lagkv.compress_carried(key, value, carried, 3, 4, 2)


def test_scores_in_place_bump_their_version_and_record_nothing():
    key, value = (x.detach() for x in pair())
    scores = torch.zeros(2, 2, key.shape[2], dtype=torch.float64)
    version = scores._version
    torch.ops.lagkv.compress_(key, value, 2, 5, 2, budget="head", scores=scores)
    assert scores._version > version
    with pytest.raises(RuntimeError, match="lagkv::compress_: scores must not require grad"):
        torch.ops.lagkv.compress_(key, value, 2, 5, 2, budget="head", scores=scores.clone().requires_grad_())


def test_the_choice_has_no_gradient(registered_backend):
    key, value = pair(device=registered_backend.device)
    scores = registered_backend.lag_score(key, value, SIZES["start"], SIZES["lag_size"])
    assert not registered_backend.compress(key, value, **SIZES)[2].requires_grad
    assert not registered_backend.topk_index(scores, 2).requires_grad


SCORES = {
    "lag_score": lambda operators, x: operators.lag_score(x, x.detach(), 2, 5),
    "partition_bounds": lambda operators, x: operators.partition_bounds(x, 2, 5),
}


@pytest.mark.filterwarnings("ignore:Error detected in _NoDerivative")  # by the graph of aot_eager
@pytest.mark.parametrize("name", SCORES)
def test_a_gradient_of_scores_is_refused(registered_backend, name):
    """Nobody takes zeros for a derivative that is not implemented; the choice made from scores stays possible."""
    key = pair(device=registered_backend.device)[0]
    text = f"lagkv::{name}: the result has no gradient"
    result = SCORES[name](registered_backend, key)
    assert torch.equal(result, SCORES[name](registered_backend, key.detach()))
    with pytest.raises(RuntimeError, match=text):
        (key.sum() + result.sum()).backward()
    torch._dynamo.reset()
    for compiler in ("eager", "aot_eager"):
        compiled = torch.compile(lambda x: SCORES[name](torch.ops.lagkv, x), backend=compiler, fullgraph=True)
        with cpu_isa(registered_backend.isa), pytest.raises(RuntimeError, match=text):
            compiled(key).sum().backward()
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=text):
            transform(lambda x: SCORES[name](registered_backend, x).sum())(key.detach())
        detached = transform(lambda x: SCORES[name](registered_backend, x.detach()).sum() + x.sum())
        assert torch.equal(detached(key.detach()), torch.ones_like(key))


def test_transforms_of_torch_func_compose(registered_backend):
    """Against the same composed of PyTorch's own gather."""
    key = pair(device=registered_backend.device)[0].detach()
    index = torch.tensor([[[3, 3, 0, 19], [1, 1, 1, 1]], [[19, 0, 5, 5], [2, 4, 6, 8]]], dtype=torch.int32)
    index = index.to(registered_backend.device)

    def mine(x):
        return registered_backend.compact(x, index)

    def gathered(x):
        return x.gather(2, index.long().unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))

    def loss_of(rows):
        return lambda x: (rows(x).sin() ** 2).sum()

    keys = torch.stack([key, key + 1, 2 * key])
    for transform in (
        lambda f: torch.func.jacfwd(f)(key),
        lambda f: torch.func.jacrev(f)(key),
        lambda f: torch.func.grad(loss_of(f))(key),
        lambda f: torch.func.hessian(loss_of(f))(key),
        lambda f: torch.func.jvp(torch.func.grad(loss_of(f)), (key,), (key.cos(),))[1],
        lambda f: torch.func.grad(lambda x: torch.func.jvp(loss_of(f), (x,), (x.cos(),))[1])(key),
        lambda f: torch.vmap(f)(keys),
        lambda f: torch.vmap(torch.func.grad(loss_of(f)))(keys),
        lambda f: torch.func.grad(lambda x: torch.vmap(loss_of(f))(x).sum())(keys),
    ):
        torch.testing.assert_close(transform(mine), transform(gathered))


def test_forward_mode_gives_the_tangents_of_the_kept_rows(registered_backend):
    key, value = (x.detach() for x in pair(device=registered_backend.device))
    plain = registered_backend.compress(key, value, **SIZES)
    with forward_ad.dual_level():
        # A tangent of the values alone, then of both.
        dual = forward_ad.make_dual(value, 3 * value)
        out = [forward_ad.unpack_dual(x) for x in registered_backend.compress(key, dual, **SIZES)]
        assert [x.tangent is None for x in out] == [True, False, True]
        assert torch.equal(out[1].tangent, 3 * plain[1])
        out = registered_backend.compress(forward_ad.make_dual(key, key + 1), dual, **SIZES)
        assert torch.equal(forward_ad.unpack_dual(out[0]).tangent, plain[0] + 1)
        assert torch.equal(out[2], plain[2])


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


IN_PLACE = {
    "compress_": ("key", "value"),
    "compress_ragged_": ("key", "value"),
    "compress_paged_": ("key_cache", "value_cache"),
    "compress_blocks": ("key_cache", "value_cache"),
}


def arguments_of(op: str) -> dict[str, Any]:
    if op == "compress_carried":
        return test_option_errors.right(op)
    if op == test_blocks_errors.OP:
        return test_blocks_errors.right()
    return (test_ragged_errors.right if op in test_ragged_errors.ARGUMENTS else test_errors.right)(op)


def operator(op: str, changed: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The operator in place as a function of the argument whose name is mapped to None."""
    (name,) = (name for name, x in changed.items() if x is None)
    return lambda x: getattr(torch.ops.lagkv, op)(*{**changed, name: x}.values())


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in IN_PLACE.items() for name in names])
def test_in_place_refuses_what_is_recorded(op, name):
    """As an operator and as a Python function, eager, compiled and in torch.func; nothing is written."""
    arguments = arguments_of(op)
    x = arguments[name]
    before = {which: value.clone() for which, value in arguments.items() if isinstance(value, Tensor)}
    text = rf"lagkv::{op}: {name} must not require grad .* got requires_grad=True"
    call = operator(op, arguments | {name: None})
    leaf = x.clone().requires_grad_()
    for recorded in (leaf, leaf * 1, leaf[:], leaf.view(leaf.shape)):
        with pytest.raises(RuntimeError, match=text):
            call(recorded)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=text):
            torch.compile(call, fullgraph=True, backend="aot_eager")(recorded)
    with pytest.raises(RuntimeError, match=text):
        torch.compile(lambda x: call(x * 1), fullgraph=True, backend="aot_eager")(leaf)
    tensors = {which: value for which, value in arguments.items() if isinstance(value, Tensor)}
    sizes = {"lag_size": 4, "keep": 2} | ({"sink_size": 3} if op == test_blocks_errors.OP else {})
    with pytest.raises(RuntimeError, match=text):
        getattr(lagkv_ext, op)(**(tensors | {name: leaf}), **sizes)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=text):
            transform(lambda x: call(x * 1).sum() + x.sum())(x)
    with pytest.raises(RuntimeError, match=f"{name} must not carry a gradient of forward mode"):
        torch.func.jvp(lambda x: call(x), (x,), (x,))
    assert torch.equal(leaf, x)
    for which, value in before.items():
        assert torch.equal(arguments[which], value)


@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_works_where_nothing_is_recorded(op):
    """No grad, detached, inference mode, inference tensors outside of it: all the same rows."""
    name = IN_PLACE[op][0]
    expected = arguments_of(op)
    index = operator(op, expected | {name: None})(expected[name])
    with torch.inference_mode():
        inference = {
            which: x.clone() if isinstance(x, Tensor) else x for which, x in arguments_of(op).items()
        }
    for mode, arguments in (
        (torch.no_grad, arguments_of(op) | {name: arguments_of(op)[name].requires_grad_()}),
        (contextlib.nullcontext, arguments_of(op) | {name: arguments_of(op)[name].requires_grad_().detach()}),
        (torch.inference_mode, arguments_of(op)),
        (torch.inference_mode, inference),
        (
            contextlib.nullcontext,
            {k: x.clone() if isinstance(x, Tensor) else x for k, x in inference.items()},
        ),
    ):
        with mode():
            found = operator(op, arguments | {name: None})(arguments[name])
        assert torch.equal(found, index)
        assert torch.equal(arguments[name].detach(), expected[name])


def test_in_place_tells_a_saved_view_of_the_change():
    """A view that no mode recorded shares its version with what autograd saved."""
    x = torch.randn(1, 1, 40, 4)
    weight = torch.ones_like(x, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        product = weight * x
        with mode():
            torch.ops.lagkv.compress_(x[:, :, :30], torch.randn(1, 1, 30, 4), 2, 5, 2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("op", IN_PLACE)
def test_vmap_and_functionalize_refuse_in_place(op):
    arguments = arguments_of(op)
    name = IN_PLACE[op][0]
    call = operator(op, arguments | {name: None})
    before = arguments[name].clone()
    with pytest.raises(RuntimeError, match=f"Batching rule not implemented for lagkv::{op}"):
        torch.vmap(call)(arguments[name][None])
    with pytest.raises(RuntimeError, match=r"custom .* operator whose output has alias annotations"):
        torch.func.functionalize(call)(arguments[name])
    assert torch.equal(arguments[name], before)


@pytest.mark.parametrize(
    "op", ["compress", "compress_carried", "lag_score", "partition_bounds", "topk_index", "compact"]
)
def test_vmap_is_a_loop(op):
    arguments = arguments_of(op)
    first = next(iter(arguments))
    batch = torch.stack([arguments[first], 2 * arguments[first], -arguments[first]])
    call = operator(op, arguments | {first: None})
    expected = [call(x) for x in batch]
    results = torch.vmap(call)(batch)
    for i, one in enumerate(expected):
        for mine, its in zip(*((x if isinstance(x, tuple) else (x,)) for x in (results, one)), strict=True):
            assert torch.equal(mine[i], its)


def test_the_reference_is_differentiable():
    key, value = pair()
    torch.autograd.gradcheck(lambda k, v: reference.compress(k, v, **SIZES)[:2], (key, value), fast_mode=True)
