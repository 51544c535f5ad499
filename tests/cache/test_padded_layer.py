"""One layer of a padded batch: any life of it, against a layer for every sequence; memory."""

from __future__ import annotations

import copy
import itertools

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.padded.padding import Padding
from lagkv_ext.cache.settings import layer_settings


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- rows, positions, what attention sees


class Batch:
    """A padded layer, and a `LagKVLayer` for every sequence that gets its tokens alone."""

    def __init__(self, settings, batch, record_past):
        self.padding = Padding(batch, 0)
        self.layer = LagKVLayer(settings)
        self.layer.pad(self.padding)
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

    def draft(self, new, rejected, seed):
        """A step of assisted decoding: recorded, and taken back in part, whatever it compressed."""
        layers = (self.layer, *self.alone)
        for layer in layers:
            layer.activate_past_recording()
        self.step([(0, 0)], new, seed)
        self.crop(rejected)
        for layer in layers:
            layer.record_past = False

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
        st.tuples(st.just("draft"), st.integers(1, 40), st.integers(0, 40)),
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
    room=st.one_of(st.none(), st.integers(0, 20)),
    budget=st.sampled_from(["partition", "head"]),
    record_past=st.sampled_from([False, False, True]),
    first=st.lists(st.tuples(st.integers(0, 26), st.sampled_from([0, 0, 3])), min_size=1, max_size=4),
    actions=ACTIONS,
)
def test_any_life_of_a_padded_layer(
    batch, lag_size, keep, sink_size, room, budget, record_past, first, actions
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
        max_tokens=None if room is None or keep == lag_size else sink_size + 2 * lag_size + keep + room,
        budget=budget,
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
        elif action == "draft":
            state.draft(number, min(number, pads), seed=10 + 100 * i)
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
    settings = layer_settings(lag_size=8, keep=2, keep_ratio=None, sink_size=4, value_weight=1.0, score="std")
    state = Batch(settings, 3, record_past=False)
    state.step([(0, 0), (20, 0), (60, 0)], 100, seed=0)
    columns = state.layer.rows
    assert state.layer.rows_per_sequence == tuple(layer.rows for layer in state.alone)
    key, value, *chosen = state.layer.storages()
    assert key.untyped_storage().nbytes() == 3 * 2 * columns * 8 * 4
    assert value.untyped_storage().nbytes() == 3 * 2 * columns * 6 * 4
    assert [x.shape[2] for x in chosen] == [layer.tracks[0].start - 4 for layer in state.alone]
    pointers = []
    for i in range(300):
        state.step([(0, 0)], 1, seed=i)
        assert state.layer.storages()[0].shape[2] <= state.layer.rows + 8 + 2 * max(8, state.layer.rows // 16)
        pointers.append(state.layer.storages()[0].data_ptr())
    state.check()
    assert sum(a != b for a, b in itertools.pairwise(pointers)) <= 300 // 8 + 1


def test_padding_alone_sets_off_nothing():
    """A sequence that is to start again from the sink does so with its next token, not with its next padding."""
    settings = layer_settings(
        lag_size=8,
        keep=2,
        keep_ratio=None,
        sink_size=4,
        value_weight=1.0,
        score="std",
        max_tokens=30,
    )
    state = Batch(settings, 2, record_past=False)
    state.step([(0, 0), (5, 0)], 10, seed=0)
    waiting = 0
    for i in range(60):
        track = state.alone[1].tracks[0]
        waiting += track.start == 4 and track.rows >= 4 + 2 * 8
        state.step([(0, 0)], 1, seed=100 + i)
        state.step([(0, 0), (1, 0)], 1, seed=200 + i)  # padding for the second
        state.check()
    assert waiting
