"""Uses of the cache of a padded batch: beams, continuations, crops, reports, own and flash masks."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
import transformers

from lagkv_ext import LagKVCache
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.padded.rows import PaddedRows
from tests.cache.models import SMALL, full_layers, generate, prompt, tiny_model
from tests.cache.padded_batches import (
    EXACT,
    assert_kept_alone,
    assert_steps_alone,
    padded,
    run,
    run_more,
    texts,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_an_unpadded_batch_never_pays():
    """Neither the mask nor the lengths of single sequences: the layers stay those of a batch without padding."""
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, prompt(40, batch=3), cache, attention_mask=torch.ones(3, 40, dtype=torch.long))
    assert {type(layer) for layer in cache.layers} == {LagKVLayer}
    assert not any(isinstance(layer.held, PaddedRows) for layer in cache.layers)


def test_a_batch_that_gets_padding_with_its_second_turn():
    model, chunks = tiny_model("llama", "sdpa", torch.float64), [40, *[1] * 9, 15, *[1] * 5]
    mask = torch.ones(2, sum(chunks), dtype=torch.long)
    mask[1, 49:60] = 0
    assert_steps_alone(
        model, "llama", {**SMALL, "keep": 2}, prompt(mask.shape[1], batch=2), mask, chunks, EXACT, 9
    )


def test_beams_of_a_padded_batch_are_those_of_every_sequence_alone():
    model, sequences = tiny_model("qwen3", "sdpa", torch.float64), texts([44, 21])
    ids, mask = padded(sequences)
    options = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    cache = LagKVCache(model.config, keep=2, **SMALL)
    beams = generate(model, ids, cache, attention_mask=mask, **options)
    for b, x in enumerate(sequences):
        alone = generate(model, x[None], LagKVCache(model.config, keep=2, **SMALL), **options)
        assert torch.equal(beams.sequences[b, ids.shape[1] :], alone.sequences[0, len(x) :])
        torch.testing.assert_close(beams.sequences_scores[b], alone.sequences_scores[0], rtol=1e-6, atol=1e-6)


def test_several_continuations_and_a_part_of_a_padded_batch():
    model, (ids, mask) = tiny_model("llama", "sdpa", torch.float64), padded(texts([40, 23]))
    cache = LagKVCache(model.config, keep=2, **SMALL)
    run(model, cache, ids, mask, [40])
    cache.batch_repeat_interleave(2)
    rest = prompt(20, batch=4, seed=5)
    whole, whole_mask = torch.cat([ids.repeat_interleave(2, 0), rest], 1), torch.ones(4, 60, dtype=torch.long)
    whole_mask[:, :40] = mask.repeat_interleave(2, 0)
    logits = [run_more(model, cache, rest[:, :12], whole_mask[:, :52])]
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.kept_positions(0).shape[0] == 2
    logits.append(run_more(model, cache, rest[[3, 0], 12:], whole_mask[[3, 0]]))
    for at, b in enumerate((3, 0)):
        real = whole_mask[b].bool()
        alone = LagKVCache(model.config, keep=2, **SMALL)
        sequence = whole[b : b + 1, real]
        expected = run(model, alone, sequence, torch.ones_like(sequence), [sequence.shape[1] - 20, 12, 8])[0]
        torch.testing.assert_close(logits[0][b], expected[-20:-8], **EXACT)
        torch.testing.assert_close(logits[1][at], expected[-8:], **EXACT)
        assert_kept_alone(cache, at, alone, range(3))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_cropped_tokens_leave_no_trace_in_a_padded_batch(kind):
    """As assisted decoding does, with recording: every step takes in tokens of which some are rejected."""
    model, (ids, mask) = tiny_model(kind, "sdpa", torch.float64), padded(texts([30, 17]))
    cache = LagKVCache(model.config, keep=2, **SMALL)
    cache.activate_past_recording()
    accepted, at = prompt(30, batch=2, seed=5), 30
    run(model, cache, ids, mask, [30])
    cache.crop(0)
    for new, rejected in [(3, 2), (1, 0), (6, 4), (5, 1), (1, 3), (4, 0)]:
        proposed = torch.cat([accepted[:, :new], prompt(rejected, batch=2, seed=at)], dim=1)
        mask = torch.cat([mask[:, :at], torch.ones(2, new + rejected, dtype=torch.long)], dim=1)
        logits = run_more(model, cache, proposed, mask)[:, :new]
        cache.crop(-rejected)
        ids, accepted, at = torch.cat([ids, accepted[:, :new]], dim=1), accepted[:, new:], at + new
        assert cache.get_seq_length() == at
    assert isinstance(cache.layers[full_layers(kind)[0]].held, PaddedRows)
    for b in range(2):
        alone = LagKVCache(model.config, keep=2, **SMALL)
        x = ids[b : b + 1, mask[b, :at].bool()]
        steps = [x.shape[1] - 20, 3, 1, 6, 5, 1, 4]
        torch.testing.assert_close(
            run(model, alone, x, torch.ones_like(x), steps)[0, -4:], logits[b], **EXACT
        )
        assert_kept_alone(cache, b, alone, full_layers(kind))
    with pytest.raises(ValueError, match="would undo a compression of sequence 0"):
        cache.crop(-40)


def test_reset_forgets_the_padding():
    model, (ids, mask) = tiny_model("llama", "sdpa", torch.float64), padded(texts([30, 17]))
    cache = LagKVCache(model.config, keep=2, **SMALL)
    first = run(model, cache, ids, mask, [30])
    cache.reset()
    assert cache.report().tokens_seen == cache.report().bytes_held == 0
    fresh = LagKVCache(model.config, keep=2, **SMALL)
    for x in (cache, fresh):
        generate(model, prompt(50, batch=3), x)
    assert cache.kept_hash() == fresh.kept_hash()
    cache.reset()
    torch.testing.assert_close(run(model, cache, ids, mask, [30]), first, rtol=0, atol=0)


def test_report_and_positions_of_a_padded_batch():
    model, (ids, mask) = tiny_model("llama"), padded(texts([60, 10]))
    cache = LagKVCache(model.config, keep=2, **SMALL)
    run(model, cache, ids, mask, [60])
    layer = cache.report().layers[0]
    assert (layer.kind, layer.tokens_seen, layer.compressions) == ("lagkv", 60, 1)
    assert layer.tokens_kept == 4 + 2 * 6 + 8
    assert layer.bytes_uncompressed == 60 * 2 * 2 * (16 + 16) * 4
    assert (
        layer.bytes_held == 24 * 2 * 2 * (16 + 16) * 4 + 2 * 12 * 4
    )  # positions of the one that was compressed
    positions = cache.kept_positions(0)
    assert positions.shape == (2, 2, 24)
    assert positions[1, 0].tolist() == [-1] * 14 + list(range(10))
    assert cache.kept_positions(0, sequence=1).tolist() == [list(range(10))] * 2
    assert cache.kept_positions(0, sequence=-2).shape == (2, 24)
    with pytest.raises(ValueError, match="index into the batch of 2, got 2"):
        cache.kept_positions(0, sequence=2)


def test_a_loop_that_makes_its_own_masks():
    """No model: the cache is told of the padding, and tells which columns are visible."""
    cache = LagKVCache(tiny_model("llama").config, keep=2, **SMALL)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :12] = 0
    cache.set_attention_mask(mask)
    alone = LagKVCache(tiny_model("llama").config, keep=2, **SMALL)
    alone.set_attention_mask(None)
    for i, new in enumerate([30, *[1] * 20, 5]):
        key, value = (
            torch.randn(2, 2, new, 16, generator=torch.Generator().manual_seed(i + k)) for k in (0, 99)
        )
        visible = cache.visible_columns(0, new)
        ours = cache.update(key, value, 0)
        real = slice(12, None) if i == 0 else slice(None)
        theirs = alone.update(key[1:, :, real], value[1:, :, real], 0)
        assert visible.shape == (2, ours[0].shape[2])
        assert torch.equal(ours[0][1, :, visible[1]], theirs[0][0])
        assert torch.equal(ours[1][1, :, visible[1]], theirs[1][0])
    assert torch.equal(cache.kept_positions(0, sequence=1), alone.kept_positions(0)[0])
    assert alone.layers[0].compressions > 2


def test_flash_attention_gets_the_rows_in_its_two_dimensional_mask():
    """Its mask function is transformers'; in the place of its kernel, one that attends to what the mask says."""
    flash, name = transformers.masking_utils.flash_attention_mask, "lagkv_2d"
    transformers.AttentionMaskInterface.register(name, flash)
    transformers.AttentionInterface.register(name, _unpadded_attention)
    model = tiny_model("llama", "sdpa", torch.float64)
    model.set_attn_implementation(name)
    try:
        chunks = [40, *[1] * 12, 6, *[1] * 9]
        mask = torch.ones(3, sum(chunks), dtype=torch.long)
        mask[0, :21], mask[1, :3] = 0, 0
        ids = prompt(mask.shape[1], batch=3)
        assert_steps_alone(model, "llama", {**SMALL, "keep": 2}, ids, mask, chunks, EXACT, 9)
        cache = LagKVCache(model.config, keep=2, skip_layers=[1], **SMALL)
        with pytest.raises(ValueError, match=f"which the one mask of {name} cannot say"):
            run(model, cache, ids, mask, chunks)
    finally:
        model.set_attn_implementation("sdpa")


def _unpadded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    out, groups, new = torch.zeros_like(query), query.shape[1] // key.shape[1], query.shape[2]
    for b in range(query.shape[0]):
        rows = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[b]
        assert len(rows) == key.shape[2]
        queries = rows[-new:]
        k, v = (x[b][:, rows].repeat_interleave(groups, dim=0) for x in (key, value))
        q = query[b][:, queries]
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        weights = (q @ k.transpose(1, 2) * scaling).masked_fill(~causal, float("-inf")).softmax(dim=-1)
        out[b][:, queries] = weights @ v
    return out.transpose(1, 2).contiguous(), None
