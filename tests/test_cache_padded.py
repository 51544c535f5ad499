"""Padded batches in LagKVCache: every sequence keeps and generates what it would alone; wrong masks are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from cache_models import KINDS, SMALL, Oracle, OracleLayer, full_layers, generate, prompt, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import Cache

from lagkv_ext import LagKVCache

ORDERS = ("use_then_compress", "compress_then_use")
MIXED = [{}, {"layer_keep_ratio": {-1: 0.5}}, {"skip_layers": [1]}]
needs_offset = pytest.mark.skipif(
    not hasattr(Cache, "get_query_offset"), reason="this transformers has one mask for all layers"
)
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
EAGER = {"rtol": 1e-3, "atol": 1e-3}  # transformers' eager attention takes its softmax in float32


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        logits.append(
            model(
                input_ids=part,
                attention_mask=mask[:, :seen],
                position_ids=positions[:, columns],
                past_key_values=cache,
            ).logits
        )
    return torch.cat(logits, dim=1)


def assert_kept_alone(cache, b, alone, layers):
    for i in layers:
        assert torch.equal(cache.kept_positions(i, sequence=b), alone.kept_positions(i)[0])


def assert_rows_alone(cache, b, alone, layers):
    for i in layers:
        rows = alone.layers[i].keys.shape[2]
        for ours, theirs in ((cache.layers[i].keys, alone.layers[i].keys),
                             (cache.layers[i].values, alone.layers[i].values)):  # fmt: skip
            torch.testing.assert_close(ours[b, :, ours.shape[2] - rows :], theirs[0], **EXACT)


# -- generate


def separated(kind, lengths, arguments, new):
    """Texts of these lengths for which no cut between scores, and no choice of a token, is close enough for the
    roundings of float32 to decide it; with what float64 generates, each alone."""
    model = tiny_model(kind, "sdpa", torch.float64)
    for seed in range(0, 5000, 100):
        sequences, generated, least = texts(lengths, seed), [], float("inf")
        for x in sequences:
            layers = {i: OracleLayer(**arguments) for i in full_layers(kind)}
            tokens = generate(model, x[None], LagKVCache(model.config, **arguments), new)
            logits = Oracle(kind, layers).forward(tokens[:, :-1], [len(x), *[1] * (new - 1)])
            first, second = logits[0, len(x) - 1 :].topk(2).values.unbind(-1)
            least = min(least, float((first - second).min()) / 10, *(layer.gap for layer in layers.values()))
            generated.append(tokens[0, len(x) :])
        if least > 1e-4:
            return sequences, generated
    raise AssertionError("no seed keeps scores apart")


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 24}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generate_gives_every_sequence_what_it_gets_alone(kind, order, changes):
    """float32, with the attention implementations that build masks; compressions come at different steps."""
    arguments = {**SMALL, "keep": 2, "order": order, **changes}
    sequences, expected = separated(kind, (47, 26, 1), arguments, new=20)
    ids, mask = padded(sequences)
    for attention in ("sdpa", "eager"):
        model = tiny_model(kind, attention)
        cache = LagKVCache(model.config, **arguments)
        tokens = generate(model, ids, cache, new=20, attention_mask=mask)
        for b, x in enumerate(sequences):
            alone = LagKVCache(model.config, **arguments)
            assert torch.equal(generate(model, x[None], alone, new=20)[0, len(x) :], expected[b])
            assert torch.equal(tokens[b, ids.shape[1] :], expected[b])
            assert_kept_alone(cache, b, alone, full_layers(kind))
        assert cache.get_seq_length() == ids.shape[1] + 19
        assert min(cache.layers[full_layers(kind)[0]].compressions_per_sequence) > 0


@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    lag_size=st.integers(2, 9),
    keep=st.integers(1, 9),
    sink_size=st.integers(0, 9),
    order=st.sampled_from(ORDERS),
    score=st.sampled_from(["std", "cosine"]),
    room=st.one_of(st.none(), st.integers(0, 20)),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    new=st.integers(2, 30),
)
def test_any_lengths(kind, lengths, extra, lag_size, keep, sink_size, order, score, room, chunk, new):
    """float64, in which no two scores of random states are near each other; also prompts in chunks."""
    model, sequences = tiny_model(kind, "sdpa", torch.float64), texts(lengths, seed=sum(lengths))
    ids, mask = padded(sequences, extra=extra)
    arguments = {
        "lag_size": lag_size,
        "keep": min(keep, lag_size - 1),
        "sink_size": sink_size,
        "order": order,
        "score": score,
        "value_weight": 0.7,  # with 1, two tokens by cosine can only tie or win both
        "max_tokens": None if room is None else sink_size + 2 * lag_size + room,
    }
    cache = LagKVCache(model.config, **arguments)
    tokens = generate(model, ids, cache, new=new, attention_mask=mask, prefill_chunk_size=chunk)
    for b, x in enumerate(sequences):
        # The same steps, but for those that bring nothing but padding to this sequence.
        pad, chunks = ids.shape[1] - len(x), [ids.shape[1]] if chunk is None else None
        chunks = chunks or [len(c) for c in torch.arange(ids.shape[1]).split(chunk)]
        steps, at = [], 0
        for n in chunks:
            steps.append(max(0, at + n - max(pad, at)))
            at += n
        alone = LagKVCache(model.config, **arguments)
        whole = tokens[b : b + 1, pad:-1]
        logits = run(
            model, alone, whole, torch.ones_like(whole), [*(n for n in steps if n), *[1] * (new - 1)]
        )
        assert torch.equal(logits[0, len(x) - 1 :].argmax(-1), tokens[b, ids.shape[1] :])
        assert_kept_alone(cache, b, alone, full_layers(kind))
        assert_rows_alone(cache, b, alone, full_layers(kind))


# -- steps of any kind


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


@pytest.mark.parametrize(
    "settings", [pytest.param(x, marks=needs_offset if x else []) for x in MIXED], ids=str
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padding_in_any_step_on_any_side(kind, order, settings):
    """Prompt, single tokens, several at once; layers that hide different columns."""
    chunks = [45, *[1] * 12, 6, 20, *[1] * 9, 5]
    mask = torch.ones(3, sum(chunks), dtype=torch.long)
    mask[0, :20] = 0  # left of the prompt
    mask[1, 40:45] = 0  # right of the prompt
    mask[1, 63:70] = 0  # left of a later turn: the 20 from column 63 on
    mask[2, 75:83] = 0  # right of it
    mask[0, 63:83] = 0  # all of it
    mask[0, 50] = 0  # a single column
    model = tiny_model(kind, "sdpa", torch.float64)
    arguments = {**SMALL, "keep_ratio": 0.25, "order": order, **settings}
    assert_steps_alone(model, kind, arguments, prompt(mask.shape[1], batch=3), mask, chunks, EXACT, 8)


@pytest.mark.parametrize(
    "settings", [pytest.param(x, marks=needs_offset if x else []) for x in MIXED], ids=str
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_keep_different_numbers_hide_different_columns(kind, attention, settings):
    """Left padding, also of several chunks, in every attention implementation and beside sliding windows."""
    chunks = [20, 30, *[1] * 12, 6, 20, *[1] * 9, 5]
    mask = torch.ones(3, sum(chunks), dtype=torch.long)
    mask[0, :27] = 0
    mask[1, :3] = 0
    # In float64, transformers' eager attention makes NaN of padding, which attends to nothing.
    model = tiny_model(kind, attention, torch.float64 if attention == "sdpa" else torch.float32)
    arguments = {**SMALL, "keep_ratio": 0.25, **settings}
    tolerance = EXACT if attention == "sdpa" else EAGER
    assert_steps_alone(model, kind, arguments, prompt(mask.shape[1], batch=3), mask, chunks, tolerance, 5)


# -- refusals


MASKS = {  # columns 0 to 9 are the prompt, as it was seen by the cache; 10 to 12 are new
    "seen changed": (
        [[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 13],
        "changes what was seen: column 1 of sequence 0 was padding when the model was given it, and now is a token",
    ),
    "token hidden": (
        [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, *[1] * 9]],
        "changes what was seen: column 3 of sequence 1 was a token when the model was given it, and now is padding",
    ),
    "hole": (
        [[0, 0, *[1] * 11], [*[1] * 11, 0, 1]],
        r"padding among the tokens of sequence 1: its tokens begin in columns \[10, 12\].*ones_like",
    ),
    "too few columns": ([[0, 0, *[1] * 10], [1] * 12], r"tokens seen and the 3 new ones, got shape \[2, 12\]"),
    "too many columns": ([[0, 0, *[1] * 12], [1] * 14], r"tokens seen and the 3 new ones, got shape \[2, 14\]"),
    "other batch": ([[0, 0, *[1] * 11]] * 3, r"attention_mask must be \[2, more than 10\] .* got \[3, 13\]"),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_does_not_fit_is_refused_before_anything_is_written(name, attention):
    rows, message = MASKS[name]
    model = tiny_model("llama", attention)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    ids, mask = prompt(13, batch=2), torch.ones(2, 13, dtype=torch.long)
    mask[0, :2] = 0
    run(model, cache, ids[:, :10], mask[:, :10], [10])
    before = cache.report(), cache.kept_hash(), [x.keys.clone() for x in cache.layers]
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(input_ids=ids[:, 10:], attention_mask=torch.tensor(rows), past_key_values=cache)
    with (
        pytest.raises(ValueError, match=r"attention_mask \[2, 13\] with every step, got none"),
        torch.no_grad(),
    ):
        model(input_ids=ids[:, 10:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask\.long\(\)"), torch.no_grad():
        model(input_ids=ids[:, 10:], attention_mask=mask.bool(), past_key_values=cache)
    assert (cache.report(), cache.kept_hash()) == before[:2]
    assert all(torch.equal(x.keys, y) for x, y in zip(cache.layers, before[2], strict=True))
    alone = LagKVCache(model.config, keep=2, **SMALL)
    expected = run(model, alone, ids[:1, 2:], torch.ones(1, 11), [8, 3])
    logits = run_more(model, cache, ids[:, 10:], mask)  # the cache goes on as if nothing had been
    torch.testing.assert_close(logits[0], expected[0, 8:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def run_more(model, cache, ids, mask):
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def test_a_first_mask_that_does_not_fit_leaves_the_cache_as_it_was():
    model, ids = tiny_model("llama"), prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 5] = 0
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match="padding among the tokens of sequence 1"):
        generate(model, ids, cache, attention_mask=mask)
    assert cache.get_seq_length() == 0
    generate(model, ids, cache)
    fresh = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, ids, fresh)
    assert cache.kept_hash() == fresh.kept_hash()


def test_a_prompt_with_padding_tokens_is_refused_with_the_way_out():
    """generate infers a mask from padding tokens by itself."""
    model, ids = tiny_model("llama"), prompt(30)
    ids[0, 3] = model.config.pad_token_id
    with pytest.raises(ValueError, match="ones_like"):
        generate(model, ids, LagKVCache(model.config, **SMALL))
    generate(model, ids, LagKVCache(model.config, **SMALL), attention_mask=torch.ones_like(ids))


def test_a_sequence_of_nothing_but_padding_is_refused():
    """At the first token that the model made up for it; a prompt whose first chunks are padding is fine."""
    model, (ids, mask) = tiny_model("llama"), padded(texts([20, 12]))
    mask[1] = 0
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match=r"sequence 1 had nothing but padding .* all 20 columns"):
        generate(model, ids, cache, attention_mask=mask)
    for refuse in (LagKVCache.check_attention_mask, LagKVCache(model.config).set_attention_mask):
        with pytest.raises(ValueError, match="nothing but padding for sequence 1"):
            refuse(mask)


def test_padding_behind_tokens_is_refused_beside_sliding_windows():
    """Their layers count columns: with padding in the window, a sequence would see fewer tokens than alone."""
    model, (ids, mask) = tiny_model("gemma3"), padded(texts([20, 12]), side="right")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    with pytest.raises(ValueError, match=r"behind a token \(column 12 of sequence 1\), .*SlidingWindow"):
        run(model, cache, ids, mask, [20])
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3, 4), r"must be \[B, tokens\], got shape \[2, 3, 4\]"),
        (torch.tensor([[0, 1, 2]]), "zeros and ones, got 2"),
        (torch.tensor([[1, 0, 1]]), r"among the tokens of sequence 0: its tokens begin in columns \[0, 2\]"),
    ],
)
def test_what_is_no_mask_of_a_prompt(mask, message):
    with pytest.raises(ValueError, match=message):
        LagKVCache.check_attention_mask(mask)
    LagKVCache.check_attention_mask(None)
    LagKVCache.check_attention_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
