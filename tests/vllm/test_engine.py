"""The plugin in a real engine: tokens as of stock vLLM and `LagKVCache`, whatever the load; blocks by formula."""

from __future__ import annotations

import random

import pytest

from lagkv_ext.vllm.backend import LagKVBuilder
from tests.vllm.cache import cache_tokens
from tests.vllm.engine import BLOCK, Engine, engine
from tests.vllm.models import prompt

KEEP_ALL, QUARTER = {"keep": 128}, {"keep": 32}
PROMPTS = [prompt(n) for n in (37, 272, 300, 560, 1000, 1999)]
NEW = 80


@pytest.fixture(scope="module")
def stock_tokens(llama):
    with engine(llama, None) as stock:
        return stock.generate(PROMPTS, NEW)


@pytest.fixture(scope="module")
def quarter_tokens(llama):
    """All prompts in one batch, in chunks of up to 2,048 tokens: what every other load must repeat."""
    with engine(llama, QUARTER) as lagkv:
        return lagkv.generate(PROMPTS, NEW)


@pytest.mark.parametrize("chunk", [256, 2048])
def test_keeping_everything_is_stock_vllm(llama, stock_tokens, chunk):
    with engine(llama, KEEP_ALL, max_num_batched_tokens=chunk) as lagkv:
        assert lagkv.generate(PROMPTS, NEW) == stock_tokens
        lagkv.assert_no_block_is_lost()


def test_a_quarter_is_what_the_cache_of_transformers_generates(llama, stock_tokens, quarter_tokens):
    for tokens, generated in zip(PROMPTS, quarter_tokens, strict=True):
        assert generated == cache_tokens(llama, tokens, NEW, boundary=256, keep=32)
    assert quarter_tokens[4:] != stock_tokens[4:]  # or this would show nothing


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 32, "sink_size": 0},
        {"keep": 64, "sink_size": 64, "score": "cosine", "value_weight": 0.5, "boundary": 512},
        {"lag_size": 64, "keep": 32, "sink_size": 45, "boundary": 64},
    ],
    ids=["no sink", "cosine", "small partitions"],
)
def test_settings_reach_the_kernel(llama, settings):
    tokens = prompt(700, seed=2)
    expected = cache_tokens(llama, tokens, 100, **{"boundary": 256, **settings})
    with engine(llama, settings, max_num_batched_tokens=300) as lagkv:
        assert lagkv.generate([tokens], 100) == [expected]


@pytest.mark.parametrize("chunk", [96, 256, 4096])
def test_text_does_not_depend_on_chunks(llama, quarter_tokens, chunk):
    with engine(llama, QUARTER, max_num_batched_tokens=chunk, max_num_seqs=16) as lagkv:
        assert lagkv.generate(PROMPTS, NEW) == quarter_tokens


def test_text_alone_is_the_text_in_a_batch(llama, quarter_tokens):
    with engine(llama, QUARTER, enable_prefix_caching=False) as lagkv:
        for tokens, expected in zip(PROMPTS[3:], quarter_tokens[3:], strict=True):
            assert lagkv.generate([tokens], NEW) == [expected]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_text_survives_preemption_in_a_small_pool(llama, prefix_caching):
    prompts = [prompt(480, seed=20 + i) for i in range(6)]
    with engine(llama, QUARTER) as lagkv:
        expected = lagkv.generate(prompts, 100)
    # Four prompts of 15 blocks fit, and grow to 19 each.
    small = {"num_gpu_blocks_override": 70, "max_model_len": 800, "max_num_batched_tokens": 256}
    with engine(llama, QUARTER, enable_prefix_caching=prefix_caching, **small) as lagkv:
        preempted = _count_preemptions(lagkv)
        assert lagkv.generate(prompts, 100) == expected
        assert preempted()
        lagkv.assert_no_block_is_lost()


def test_decode_steps_as_graphs_replay_them_change_no_text(llama, quarter_tokens, monkeypatch):
    """Compressing in every step, with metadata in fixed buffers; there are no graphs on a CPU (test_graphs.py)."""
    monkeypatch.setattr(LagKVBuilder, "_captures", lambda self: True)
    small = {"num_gpu_blocks_override": 110, "max_model_len": 2150, "max_num_batched_tokens": 256}
    with engine(llama, QUARTER, enable_prefix_caching=True, **small) as lagkv:
        assert lagkv.generate(PROMPTS, NEW) == quarter_tokens
        assert lagkv.generate(PROMPTS[::-1], NEW) == quarter_tokens[::-1]
        lagkv.assert_no_block_is_lost()


def _count_preemptions(lagkv: Engine):
    seen: list[str] = []
    scheduler = lagkv.scheduler
    original = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        seen.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return lambda: len(seen)


def test_prompts_that_share_a_prefix_share_raw_and_compressed_blocks(llama):
    shared = prompt(1500, seed=3)
    prompts = [shared + prompt(120 + i, seed=4) for i in range(4)]
    with engine(llama, QUARTER) as lagkv:
        expected = lagkv.generate(prompts, 80)
    with engine(llama, QUARTER, enable_prefix_caching=True) as lagkv:
        assert lagkv.generate(prompts[:1], 80) == expected[:1]
        outputs = lagkv.outputs(prompts[1:], 80)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected[1:]
        # All whole blocks of the shared part, but for those that a state does not allow to end on.
        assert [output.num_cached_tokens for output in outputs] == [1472] * 3
        again = lagkv.outputs(prompts, 80)
        assert [list(output.outputs[0].token_ids) for output in again] == expected
        assert all(output.num_cached_tokens >= 1472 for output in again)
        lagkv.assert_no_block_is_lost()


def test_blocks_in_use_are_those_of_the_formula_at_every_step(llama):
    with engine(llama, QUARTER, max_num_batched_tokens=200, num_gpu_blocks_override=140) as lagkv:
        steps = _check_every_step(lagkv)
        lagkv.generate(PROMPTS, 100)
        assert steps() > 100
        lagkv.assert_no_block_is_lost()


def _check_every_step(lagkv: Engine):
    """Compares each running request's blocks with the plan whenever the scheduler has decided on a step."""
    scheduler, checked = lagkv.scheduler, []
    raw, compressed = lagkv.managers
    plan = raw.plan
    schedule = scheduler.schedule

    def checking(*args, **kwargs):
        output = schedule(*args, **kwargs)
        total = 0
        for request_id, new in output.num_scheduled_tokens.items():
            end = scheduler.requests[request_id].num_computed_tokens  # already counts this step
            held = tuple(
                sum(not block.is_null for block in manager.req_to_blocks[request_id])
                for manager in (raw, compressed)
            )
            assert held == plan.held(end - new, end), (request_id, end, new)
            peak = plan.peak(end, raw.in_flight)
            assert held[0] <= peak[0]
            assert held[1] <= peak[1]
            total += sum(held)
            checked.append(request_id)
        if len(output.num_scheduled_tokens) == len(scheduler.running):
            used = lagkv.pool.num_gpu_blocks - 1 - lagkv.pool.get_num_free_blocks()
            assert used == total
        return output

    scheduler.schedule = checking
    return lambda: len(checked)


def test_a_prompt_longer_than_the_pool_is_served(llama, quarter_tokens):
    # 1,999 + 150 tokens are 68 blocks; stock vLLM would need them all.
    small = {"num_gpu_blocks_override": 60, "max_model_len": 2150, "max_num_batched_tokens": 256}
    with engine(llama, QUARTER, **small) as lagkv:
        assert lagkv.generate(PROMPTS[-1:], NEW) == quarter_tokens[-1:]
    with pytest.raises(ValueError, match="max seq len"), engine(llama, None, **small):
        pass
    # The peak counts, and the message has the compressed numbers.
    with (
        pytest.raises(ValueError, match="estimated maximum model length is"),
        engine(llama, QUARTER, **{**small, "num_gpu_blocks_override": 30}),
    ):
        pass


@pytest.mark.parametrize("asynchronous", [False, True])
def test_mixed_load_loses_no_block_and_changes_no_text(llama, asynchronous):
    rng = random.Random(5)
    roots = [prompt(n, seed=6) for n in (520, 800)]
    prompts, sizes = [], []
    for i in range(24):
        root = rng.choice(roots)[: rng.randrange(1, 800)] if rng.random() < 0.7 else []
        prompts.append(root + prompt(rng.randrange(1, 400), seed=10 + i))
        sizes.append(rng.randrange(1, 120))
    with engine(llama, QUARTER) as lagkv:
        expected = [list(o.outputs[0].token_ids) for o in lagkv.outputs(prompts, sizes)]
    with engine(
        llama,
        QUARTER,
        enable_prefix_caching=True,
        num_gpu_blocks_override=90,
        max_model_len=1400,
        max_num_batched_tokens=320,
        async_scheduling=asynchronous,
    ) as lagkv:
        outputs = lagkv.outputs(prompts, sizes)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        assert sum(o.num_cached_tokens for o in outputs) > 500
        lagkv.assert_no_block_is_lost()


def test_thousands_of_short_requests_lose_no_block(llama):
    prompts = [prompt(1 + i % 40, seed=i % 7) for i in range(2000)]
    with engine(
        llama, QUARTER, enable_prefix_caching=True, num_gpu_blocks_override=80, max_model_len=400
    ) as lagkv:
        assert all(len(tokens) == 2 for tokens in lagkv.generate(prompts, 2))
        lagkv.assert_no_block_is_lost()


@pytest.mark.parametrize("keep", [128, 32])
def test_sliding_window_layers_keep_their_own_groups(gemma3, keep):
    prompts = PROMPTS[2:5]
    with engine(gemma3, {"keep": keep}, max_num_batched_tokens=300, num_gpu_blocks_override=900) as lagkv:
        generated = lagkv.generate(prompts, 60)
        assert len(lagkv.managers) == 4  # two of sliding windows, raw, compressed
        lagkv.assert_no_block_is_lost()
    if keep == 128:
        with engine(gemma3, None, max_num_batched_tokens=300, num_gpu_blocks_override=900) as stock:
            assert generated == stock.generate(prompts, 60)
    else:
        assert generated == [cache_tokens(gemma3, p, 60, boundary=256, keep=32) for p in prompts]
    # A second pass from the prefix cache.
    with engine(
        gemma3,
        {"keep": keep},
        max_num_batched_tokens=300,
        num_gpu_blocks_override=900,
        enable_prefix_caching=True,
    ) as lagkv:
        assert lagkv.generate(prompts, 60) == generated
        outputs = lagkv.outputs(prompts, 60)
        assert [list(output.outputs[0].token_ids) for output in outputs] == generated
        assert sum(output.num_cached_tokens for output in outputs) > 1000
        lagkv.assert_no_block_is_lost()


def test_block_size_is_that_of_the_engine(llama):
    with engine(llama, QUARTER) as lagkv:
        assert {manager.block_size for manager in lagkv.managers} == {BLOCK}
