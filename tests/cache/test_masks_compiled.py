"""Attention masks in compiled models: seen or refused, and unchanged for other caches."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.models import SMALL, generate, prompt, several_tokens_compiled, tiny_model
from tests.cache.padded_batches import padded, texts


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch():
    return padded(texts([40, 29]))


def compressed(model, **settings):
    return LagKVCache(model.config, **{**SMALL, "keep": 2, **settings})


@pytest.mark.parametrize(("attention", "settings"), [("sdpa", {}), ("eager", {"skip_layers": [1]})], ids=str)
def test_padding_is_seen_in_a_compiled_model(attention, settings):
    torch._dynamo.reset()
    model, (ids, mask) = copy.deepcopy(tiny_model("llama", attention)), batch()
    options = {"attention_mask": mask, "new": 4}
    expected = generate(model, ids, compressed(model, **settings), **options)
    model.forward = torch.compile(model.forward, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64):
        assert torch.equal(generate(model, ids, compressed(model, **settings), **options), expected)


def test_a_graph_without_breaks_is_refused():
    torch._dynamo.reset()
    model = copy.deepcopy(tiny_model("llama"))
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="LagKVCache"):
        generate(model, prompt(30), compressed(model))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_other_caches_get_the_masks_of_transformers(fullgraph):
    """With the mask functions replaced: the same bits, and one graph where it was one."""
    torch._dynamo.reset()
    compressed(tiny_model("llama"))  # replaces them
    model, (ids, mask) = copy.deepcopy(tiny_model("llama")), batch()
    function = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    arguments = {"batch_size": 2, "q_length": 3, "kv_length": 43, "q_offset": 40, "kv_offset": 0}
    seen = torch.ones(2, 43, dtype=torch.bool)
    seen[0, :9] = False
    assert torch.equal(
        function(**arguments, attention_mask=seen), sdpa_mask(**arguments, attention_mask=seen)
    )
    expected = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=fullgraph)
    static = StaticCache(model.config, max_cache_len=80)
    assert torch.equal(generate(model, ids, static, attention_mask=mask), expected)


@several_tokens_compiled
def test_a_compiled_step_refuses_a_mask_that_it_cannot_read():
    """All ones or not: it would be the same graph."""
    torch._dynamo.reset()
    model, ids = tiny_model("llama"), prompt(5, batch=2)
    cache = LagKVStaticCache(model.config, capacity=32, keep=2, max_batch_size=2, step_tokens=5, **SMALL)
    step = torch.compile(
        lambda ids, mask: model(input_ids=ids, attention_mask=mask, **cache_argument(cache)).logits,
        fullgraph=True,
        backend="eager",
    )
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with (
        pytest.raises(Exception, match="cannot read a 2-D attention_mask: give"),
        torch.no_grad(),
    ):
        step(ids, mask)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        step(ids, None)
    assert cache.get_seq_length() == 5
