"""A quality check goes through the compressions of the generation, and measures what it says."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from lagkv_ext import LagKVCache
from lagkv_ext.cache.fidelity import departure, forward
from lagkv_ext.serving.rollout.check import compare, replay
from tests.cache.models import KINDS, SMALL, full_layers, generate, prompt, tiny_model

SETTINGS = st.fixed_dictionaries(
    {
        "lag_size": st.integers(4, 12),
        "sink_size": st.integers(0, 6),
        "keep": st.integers(1, 3),
        "score": st.sampled_from(["std", "cosine"]),
    },
    optional={
        "max_tokens": st.integers(30, 60),
        "quantization": st.just("int8"),
        "skip_layers": st.just([-1]),
    },
) | st.fixed_dictionaries(
    {
        "lag_size": st.just(8),
        "sink_size": st.integers(0, 6),
        "keep": st.integers(1, 3),
        "boundary": st.sampled_from([8, 24]),
    }
)


def step_by_step(kind: str, cache, ids: torch.Tensor, said: torch.Tensor, chunk: int) -> torch.Tensor:
    """Log probabilities ``[T, vocabulary]`` of the answer as generation sees them: after the prompt, one by one."""
    model, length, logits = tiny_model(kind, dtype=torch.float64), ids.shape[1], []
    with torch.inference_mode():
        for begin in range(0, length, chunk):
            part = ids[:, begin : begin + chunk]
            last = forward(model, part, cache, position=begin, logits_to_keep=1)
        logits.append(last)
        for i in range(said.shape[1] - 1):
            logits.append(forward(model, said[:, i : i + 1], cache, position=length + i, logits_to_keep=1))
    return torch.cat(logits, dim=1)[0].log_softmax(-1)


@given(
    st.sampled_from(KINDS),
    SETTINGS,
    st.integers(1, 70),
    st.integers(1, 60),
    st.integers(0, 99),
    st.integers(1, 70),
)
def test_the_same_rows_stay_and_the_same_is_said_as_one_by_one(kind, settings, length, tokens, seed, chunk):
    model, chunk = tiny_model(kind, dtype=torch.float64), settings.get("boundary", chunk)
    ids, said = prompt(length, seed=seed), prompt(tokens, seed=seed + 1000)
    full, compressed = DynamicCache(config=model.config), LagKVCache(model.config, **settings)
    agree, kl = departure(*(step_by_step(kind, cache, ids, said, chunk) for cache in (full, compressed)))
    replayed = LagKVCache(model.config, **settings)
    found = compare(model, ids, said, DynamicCache(config=model.config), replayed, chunk)
    for layer in full_layers(kind):
        assert torch.equal(replayed.kept_positions(layer), compressed.kept_positions(layer))
    assert found.tokens == tokens
    assert found.prompt_tokens == length
    assert found.agreement == pytest.approx(agree.double().mean().item(), abs=1e-9)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-5)  # replay takes logits to float32
    assert found.compressed or kl.mean().item() < 1e-9  # else it says something, and must count


@pytest.mark.parametrize("kind", KINDS)
def test_what_drops_nothing_departs_in_nothing(kind):
    model, ids = tiny_model(kind), prompt(80)
    text = generate(model, ids, DynamicCache(config=model.config))
    check = replay(model, ids, text[:, 80:], {**SMALL, "keep_ratio": 1.0})
    assert check.agreement == 1.0
    assert check.kl < 1e-6


@pytest.mark.parametrize(
    ("length", "tokens", "options", "compressed"),
    [
        (100, 1, {}, False),  # said from the whole prompt, before anything of it was dropped
        (100, 2, {}, True),
        (100, 1, {"prefill_chunk_size": 50}, True),
        (10, 11, {}, False),  # sets off a compression with its last step, of 20 rows
        (10, 12, {}, True),
    ],
)
def test_a_check_says_whether_anything_was_said_with_rows_dropped(length, tokens, options, compressed):
    check = replay(tiny_model("llama"), prompt(length), prompt(tokens), {**SMALL, "keep": 2}, **options)
    assert check.compressed == compressed
    assert (check.kl > 1e-6) == compressed


def test_fewer_rows_depart_further():
    model, ids = tiny_model("llama"), prompt(200)
    text = generate(model, ids, DynamicCache(config=model.config))[:, 200:]
    kls = [replay(model, ids, text, {**SMALL, "keep": keep}).kl for keep in (8, 7, 4, 1)]
    assert kls == sorted(kls)
    assert kls[0] < 1e-6 < kls[1]


def test_few_steps_are_made():
    """65 answer tokens after a prompt that just set off a compression: steps of 8 end where the next comes due."""
    model, steps = tiny_model("llama"), []
    hook = model.register_forward_pre_hook(
        lambda module, _, named: steps.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        replay(model, prompt(4 + 16), prompt(65), {**SMALL, "keep": 2})
    finally:
        hook.remove()
    assert steps == [20, 20, *[8] * 16]


def test_a_model_that_says_no_number_is_the_worst():
    model = tiny_model("llama")
    weight = model.lm_head.weight.data
    kept = weight.clone()
    try:
        weight[3] = float("nan")
        check = replay(model, prompt(30), prompt(5), {**SMALL, "keep": 2})
    finally:
        weight.copy_(kept)
    assert (check.agreement, check.kl) == (0.0, math.inf)


@given(st.integers(2, 9), st.integers(0, 1000))
def test_departure_is_the_divergence_and_what_is_ruled_out_adds_nothing(n, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, n, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    agree, kl = departure(p.log(), q.log())
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(-1))
    assert torch.equal(agree, p.argmax(-1) == q.argmax(-1))
    none = torch.zeros(3, 1, dtype=torch.float64)
    more = [torch.cat([x, none], dim=-1).log() for x in (p, q)]
    torch.testing.assert_close(departure(*more)[1], kl)
    assert departure(p.log(), more[1][:, 1:])[1].isinf().all()  # ruled out by the other one alone


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 2], TypeError, "must be a tensor of token ids, got list"),
        (torch.ones(1, 3), TypeError, "must be a tensor of token ids, got a tensor of torch.float32"),
        (torch.ones(2, 3).long(), ValueError, r"must be one sequence, .* got shape \[2, 3\]"),
        (torch.ones(1, 0).long(), ValueError, r"must be one sequence, .* got shape \[1, 0\]"),
    ],
)
def test_wrong_ids(ids, error, message):
    model, good = tiny_model("llama"), prompt(5)
    with pytest.raises(error, match=f"input_ids {message}"):
        replay(model, ids, good, SMALL)
    with pytest.raises(error, match=f"output_ids {message}"):
        replay(model, good, ids, SMALL)
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1, got 0"):
        replay(model, good, good, SMALL, prefill_chunk_size=0)
