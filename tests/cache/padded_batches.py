"""Padded batches as tokenizers make them, and the comparison with every sequence alone."""

from __future__ import annotations

import torch

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.models import VERSION, full_layers, prompt

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
EAGER = {"rtol": 1e-3, "atol": 1e-3}  # transformers' eager attention takes its softmax in float32


def padded(sequences, side="left", extra=0):
    """Token ids and mask, as a tokenizer makes them; padding holds random tokens, which nothing may see."""
    columns = max(len(x) for x in sequences) + extra
    ids, mask = (
        prompt(columns, len(sequences), seed=77),
        torch.zeros(len(sequences), columns, dtype=torch.long),
    )
    for b, x in enumerate(sequences):
        place = slice(columns - len(x), columns) if side == "left" else slice(0, len(x))
        ids[b, place], mask[b, place] = x, 1
    return ids, mask


def texts(lengths, seed=0):
    return [prompt(n, seed=seed + 10 * b)[0] for b, n in enumerate(lengths)]


@torch.no_grad()
def run(model, cache, ids, mask, chunks):
    """Logits of all columns, with positions that count the tokens of each sequence."""
    positions, logits, seen = (mask.cumsum(1) - 1).clamp(min=0), [], 0
    for part in ids.split(chunks, dim=1):
        columns = slice(seen, seen + part.shape[1])
        seen = columns.stop
        tell(cache, mask[:, :seen], positions[:, columns])
        logits.append(
            model(
                input_ids=part,
                attention_mask=mask[:, :seen],
                position_ids=positions[:, columns],
                **cache_argument(cache),
            ).logits
        )
    return torch.cat(logits, dim=1)


def tell(cache, mask, positions):
    """Positions from the caller, where models do not hand them on."""
    if VERSION < (5, 24) and isinstance(cache, LagKVCache) and not mask.all():
        cache.set_attention_mask(mask, positions)


def assert_kept_alone(cache, b, alone, layers):
    for i in layers:
        assert torch.equal(cache.kept_positions(i, sequence=b), alone.kept_positions(i)[0])


def assert_rows_alone(cache, b, alone, layers):
    for i in layers:
        rows = alone.layers[i].keys.shape[2]
        for ours, theirs in ((cache.layers[i].keys, alone.layers[i].keys),
                             (cache.layers[i].values, alone.layers[i].values)):  # fmt: skip
            torch.testing.assert_close(ours[b, :, ours.shape[2] - rows :], theirs[0], **EXACT)


@torch.no_grad()
def run_more(model, cache, ids, mask):
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    tell(cache, mask, positions)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache_argument(cache)).logits


def assert_steps_alone(model, kind, arguments, ids, mask, chunks, tolerance, least):
    cache = LagKVCache(model.config, **arguments)
    logits = run(model, cache, ids, mask, chunks)
    for b in range(len(ids)):
        real = mask[b].bool()
        steps = [n for n in (int(x.sum()) for x in mask[b].split(chunks)) if n]
        alone = LagKVCache(model.config, **arguments)
        whole = ids[b : b + 1, real]
        expected = run(model, alone, whole, torch.ones_like(whole), steps)
        torch.testing.assert_close(logits[b, real], expected[0], **tolerance)
        assert_kept_alone(cache, b, alone, full_layers(kind))
        assert alone.report().compressions >= least
