"""One layer of LagKVCache: the recursion against the reference and the authors' algorithm, memory, and refusals."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lagkv_ext import reference
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.report import storage_bytes
from lagkv_ext.cache.settings import layer_settings
from tests.ops.test_paper import AuthorsHead, TooClose


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_layer(**changes) -> LagKVLayer:
    settings = {
        "lag_size": 8,
        "keep": 2,
        "keep_ratio": None,
        "sink_size": 4,
        "value_weight": 1.0,
        "score": "std",
    }
    return LagKVLayer(layer_settings(**{**settings, **changes}))


def states(new, batch=2, heads=2, dims=(8, 6), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, new, dim, generator=generator).to(dtype) for dim in dims)


class Record:
    """All that was ever held by one layer, kept naively: every step concatenates and compresses with the reference.

    While it records, a step can be taken back with its compression, until the next step or any change but `crop`.
    """

    def __init__(self, lag_size, keep, sink_size, scoring):
        self.lag_size, self.keep, self.sink_size, self.scoring = lag_size, keep, sink_size, scoring
        self.rows = None  # key, value, positions
        self.reset()

    def reset(self):
        self.rows, self.seen, self.start, self.compressions = None, 0, self.sink_size, 0
        self.recording, self.awaits_crop, self.before = False, False, None

    def record(self):
        self.recording, self.awaits_crop = True, False

    def append(self, key, value):
        batch, heads, new, _ = key.shape
        positions = torch.arange(self.seen, self.seen + new).expand(batch, heads, new)
        arrived = (key, value, positions)
        if self.rows is not None:
            arrived = tuple(torch.cat(pair, dim=2) for pair in zip(self.rows, arrived, strict=True))
        self.rows, self.seen = arrived, self.seen + new
        if self.awaits_crop:
            self.recording = False
        self.awaits_crop, self.before = self.recording, None
        if self.recording:
            self.before = self.rows, self.start, self.compressions
        self._compress()
        return arrived

    def _compress(self):
        count = (self.length - self.start) // self.lag_size - 1
        if count >= 1 and self.keep < self.lag_size:
            key, value, positions = self.rows
            key, value, index = reference.compress(
                key, value, self.start, self.lag_size, self.keep, **self.scoring
            )
            self.rows = key, value, positions.gather(2, index.long())
            self.start += count * self.keep
            self.compressions += 1

    def map(self, change):
        self.before = None
        if self.rows is not None:
            self.rows = tuple(change(x) for x in self.rows)

    def crop(self, removed):
        self.awaits_crop = False
        if self.before is not None:
            (self.rows, self.start, self.compressions), self.before = self.before, None
        if self.rows is not None:
            removed = min(removed, self.length)
            self.rows = tuple(x[:, :, : self.length - removed] for x in self.rows)
            self.seen -= removed
            self._compress()

    @property
    def length(self):
        return self.rows[0].shape[2]

    @property
    def croppable(self):
        rows, start, compressions = self.before or (self.rows, self.start, self.compressions)
        return rows[0].shape[2] - start if compressions else rows[0].shape[2]


def assert_same(layer: LagKVLayer, record: Record) -> None:
    assert (layer.get_seq_length(), layer.compressions) == (record.seen, record.compressions)
    if record.rows is None:
        assert layer.keys is layer.values is None
        assert (layer.rows, layer.storages()) == (0, [])
        return
    assert layer.rows == record.length
    assert torch.equal(layer.keys, record.rows[0])
    assert torch.equal(layer.values, record.rows[1])
    positions = layer.kept_positions()
    assert positions.dtype == torch.int32
    assert torch.equal(positions.long(), record.rows[2])


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("decode"), st.integers(2, 20)),
        st.tuples(st.just("decode until a compression"), st.just(20)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("record"), st.just(0)),
        st.tuples(st.just("reorder"), st.integers(0, 1 << 16)),
        st.tuples(st.just("repeat"), st.integers(2, 3)),
        st.tuples(st.just("select"), st.integers(0, 1 << 16)),
        st.tuples(st.just("fork"), st.booleans()),
        st.tuples(st.just("read"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=25,
)


@given(
    lag_size=st.integers(1, 9),
    keep=st.integers(1, 9),
    sink_size=st.integers(0, 9),
    scoring=st.fixed_dictionaries(
        {"score": st.sampled_from(["std", "cosine"]), "value_weight": st.sampled_from([0.0, 1.0, 2.5])}
    ),
    actions=ACTIONS,
)
def test_any_life_of_a_layer(lag_size, keep, sink_size, scoring, actions):
    """Appending, cropping, beams, forks, in any order: rows, values and positions of every head, bit for bit."""
    keep = min(keep, lag_size)
    layer = make_layer(lag_size=lag_size, keep=keep, sink_size=sink_size, **scoring)
    record = Record(lag_size, keep, sink_size, scoring)
    batch, abandoned = 2, []
    for step, (action, number) in enumerate(actions):
        if action in ("append", "decode", "decode until a compression"):
            compressions = record.compressions
            for i, new in enumerate([number] if action == "append" else [1] * number):
                if action == "decode until a compression" and record.compressions > compressions:
                    break
                key, value = states(new, batch, seed=1000 * step + i)
                columns, offset = layer.get_mask_sizes(new)
                assert offset + columns == layer.get_seq_length() + new
                seen = layer.update(key, value)
                assert seen[0].shape[2] == seen[1].shape[2] == columns
                held = record.append(key, value)
                assert torch.equal(seen[0], held[0])
                assert torch.equal(seen[1], held[1])
        elif action == "crop":
            if record.rows is None or number <= record.croppable or record.croppable == record.seen:
                layer.crop(-number)
                record.crop(number)
            else:
                with pytest.raises(ValueError, match="undo a compression"):
                    layer.crop(-number)
        elif action in ("reorder", "select"):
            size = batch if action == "reorder" else 1 + number % 3
            index = torch.randint(0, batch, (size,), generator=torch.Generator().manual_seed(number))
            (layer.reorder_cache if action == "reorder" else layer.batch_select_indices)(index)
            record.map(lambda x, index=index: x[index])
            batch = size if record.rows is not None else batch
        elif action == "repeat":
            if batch * number > 6:
                continue
            layer.batch_repeat_interleave(number)
            record.map(lambda x, number=number: x.repeat_interleave(number, dim=0))
            batch = batch * number if record.rows is not None else batch
        elif action == "record":
            layer.activate_past_recording()
            record.record()
        elif action == "fork":
            other = copy.deepcopy(layer)
            abandoned.append((layer, copy.deepcopy(record)) if number else (other, copy.deepcopy(record)))
            layer = other if number else layer
        elif action == "read":
            record.before = None
            assert_same(layer, record)
        else:
            layer.reset()
            record.reset()
    for one, its_record in [(layer, record), *abandoned]:
        assert_same(one, its_record)


@given(
    heads=st.integers(1, 3),
    dims=st.tuples(st.sampled_from([2, 8, 33]), st.sampled_from([2, 16, 65])),
    sink=st.integers(0, 6),
    lag_size=st.integers(2, 24),
    keep=st.integers(1, 24),
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    decode=st.integers(0, 40),
    seed=st.integers(0, 1 << 20),
)
def test_the_authors_algorithm_keeps_the_same_tokens(heads, dims, sink, lag_size, keep, chunks, decode, seed):
    keep = min(keep, lag_size)
    layer = make_layer(lag_size=lag_size, keep=keep, sink_size=sink)
    theirs = [AuthorsHead(*dims, sink, lag_size, keep) for _ in range(heads)]
    generator = torch.Generator().manual_seed(seed)
    try:
        for new in [*chunks, *[1] * decode]:
            key, value = (
                torch.randn(1, heads, new, dim, generator=generator, dtype=torch.float64) for dim in dims
            )
            layer.update(key, value)
            for h, head in enumerate(theirs):
                head.append(key[0, h], value[0, h])
    except TooClose:
        assume(False)
    positions = layer.kept_positions()[0].tolist()
    for h, head in enumerate(theirs):
        assert positions[h] == sorted(head.positions)
        order_of_rows = torch.tensor(head.positions).argsort()
        assert torch.equal(layer.keys[0, h], head.key[order_of_rows])
        assert torch.equal(layer.values[0, h], head.value[order_of_rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer, record = make_layer(), Record(8, 2, 4, {})
    for i, new in enumerate([30, *[1] * 25]):
        key, value = states(new, dtype=dtype, seed=i)
        layer.update(key, value)
        record.append(key, value)
    assert_same(layer, record)


@given(
    steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 7)), min_size=1, max_size=12),
)
def test_recording_the_past_rejected_tokens_leave_no_trace(steps):
    """Assisted decoding: every step takes in tokens, of which `crop` rejects some; they never choose what is kept."""
    layer, record = make_layer(), Record(8, 2, 4, {})
    layer.activate_past_recording()
    for i, (accepted, rejected) in enumerate(steps):
        key, value = states(accepted + rejected, seed=i)
        held = record.rows[0] if record.rows else states(0)[0]
        columns, _ = layer.get_mask_sizes(accepted + rejected)
        returned = layer.update(key, value)
        assert returned[0].shape[2] == columns
        assert torch.equal(returned[0], torch.cat([held, key], dim=2))
        layer.crop(-rejected)
        record.append(key[:, :, :accepted], value[:, :, :accepted])
        assert_same(layer, record)
        assert layer.storages()[0].shape[2] <= 2 * max(74, layer.rows + layer.rows // 16)


def test_states_in_any_memory_order():
    """[B, N, H, D] transposed, as projections leave them; and a last dimension that is not contiguous."""
    for order in ((0, 2, 1, 3), (0, 1, 3, 2)):
        layer, record = make_layer(), Record(8, 2, 4, {})
        for i, new in enumerate([40, *[1] * 9, 50]):
            key, value = states(new, seed=i)
            layer.update(*(x.permute(order).contiguous().permute(order) for x in (key, value)))
            record.append(key, value)
        assert_same(layer, record)


# -- memory


class Traffic(TorchDispatchMode):
    """Counts the elements that operators write: of outputs in new storage, and of what is written in place."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given_storages = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)
        }
        for x in tree_leaves(result):
            is_new = torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given_storages
            if func._schema.is_mutable or (is_new and not func.name().startswith("aten::empty")):
                self.elements += x.numel()
        return result


def test_appending_copies_only_the_new_rows():
    """Between compressions and growths, a token costs its own row, not the cache's."""
    layer = make_layer(lag_size=64, keep=16, sink_size=4)
    layer.update(*states(300))
    layer.update(*states(1))
    pointer = layer.keys.data_ptr()
    token = states(1, seed=1)
    for _ in range(20):
        with Traffic() as traffic:
            layer.update(*token)
        assert traffic.elements == token[0].numel() + token[1].numel()
    assert layer.keys.data_ptr() == pointer
    assert layer.compressions == 1


def test_the_traffic_counter_sees_a_copy():
    layer = make_layer(keep_ratio=1, keep=None)
    layer.update(*states(300))
    key, _ = states(1)
    with Traffic() as traffic:
        torch.cat([layer.keys, key], dim=2)
    assert traffic.elements == 2 * 2 * 301 * 8


def test_decoding_allocates_rarely():
    """Steady decoding replaces its buffer once in three compressions at most, and never has room for much more."""
    layer = make_layer()
    layer.update(*states(20))
    pointers = []
    for i in range(800):
        layer.update(*states(1, seed=i))
        pointers.append(layer.storages()[0].data_ptr())
        assert layer.storages()[0].shape[2] <= layer.tracks[0].start + 2 * 8 + max(
            2 * 2, layer.tracks[0].start // 16
        )
    assert layer.compressions == 101
    changes = sum(a != b for a, b in itertools.pairwise(pointers))
    assert changes <= 35


def test_without_compression_growth_is_geometric():
    layer = make_layer(keep_ratio=1.0, keep=None)
    pointers = set()
    for i in range(2000):
        layer.update(*states(1, batch=1, heads=1, seed=i))
        pointers.add(layer.storages()[0].data_ptr())
    assert layer.storages()[0].shape[2] <= 2000 * 1.07 + 64
    with Traffic() as traffic:
        for i in range(2000):
            layer.update(*states(1, batch=1, heads=1, seed=i))
    assert traffic.elements < 20 * 2000 * 14


@pytest.mark.parametrize("new", [52, 31])
def test_a_prompt_leaves_exactly_the_kept_rows(new):
    """After the prompt and after a long chunk nothing holds more than the rows kept: storages, not views."""
    layer = make_layer()
    for i in range(2):
        layer.update(*states(new, seed=i))
        key, value, chosen = layer.storages()
        assert key.untyped_storage().nbytes() == 2 * 2 * layer.rows * 8 * 4
        assert value.untyped_storage().nbytes() == 2 * 2 * layer.rows * 6 * 4
        assert chosen.untyped_storage().nbytes() == 2 * 2 * (layer.tracks[0].start - 4) * 4
        assert storage_bytes(layer.storages()) == sum(
            x.untyped_storage().nbytes() for x in (key, value, chosen)
        )
        assert layer.rows < layer.seen


def test_the_full_states_die_with_the_step():
    """The states given, and those returned to attention, are not kept alive by the cache."""
    layer = make_layer()
    deaths = []

    def step(new, seed):
        key, value = states(new, seed=seed)
        returned = layer.update(key, value)
        for x in (key, value, *returned):
            weakref.finalize(x.untyped_storage(), deaths.append, x.untyped_storage().data_ptr())
        return {x.untyped_storage().data_ptr() for x in returned}

    full = step(60, 0)
    gc.collect()
    assert full <= set(deaths)
    deaths.clear()
    full = step(40, 1)
    gc.collect()
    assert full <= set(deaths)
    assert not full & {x.untyped_storage().data_ptr() for x in layer.storages()}


def test_what_attention_sees_stays_intact_until_the_next_step():
    """A compression that runs in place waits until attention has run."""
    layer = make_layer()
    for i, new in enumerate([17, 1, 1, 1, *[1] * 40, 9, 30, 1]):
        held = layer.keys.clone() if layer.rows else states(0)[0]
        key, value = states(new, seed=i)
        returned = layer.update(key, value)
        assert torch.equal(returned[0], torch.cat([held, key], dim=2))
        layer.get_mask_sizes(1)
        assert torch.equal(returned[0], torch.cat([held, key], dim=2))
    assert layer.compressions >= 8


def test_every_change_comes_after_the_compression_that_is_due():
    """The last token of a partition sets off a compression in place, which may still wait when the next call comes."""
    changes = [
        (lambda x: x.crop(-1), lambda x: x.crop(1)),
        (lambda x: x.crop(-3), lambda x: x.crop(3)),
        (lambda x: x.reorder_cache(torch.tensor([1, 0])), lambda x: x.map(lambda y: y.flip(0))),
        (lambda x: x.batch_repeat_interleave(2), lambda x: x.map(lambda y: y.repeat_interleave(2, dim=0))),
        (lambda x: x.batch_select_indices(torch.tensor([1])), lambda x: x.map(lambda y: y[1:])),
        (lambda x: x.offload(), lambda x: None),
        (lambda x: x.reset(), lambda x: x.reset()),
        (lambda x: copy.deepcopy(x).crop(-5), lambda x: None),
    ]
    for ours, theirs in changes:
        layer, record = make_layer(), Record(8, 2, 4, {})
        for i, new in enumerate([30, *[1] * 6]):
            layer.update(*states(new, seed=i))
            assert layer.compressions == 1 + (i == 6)
            record.append(*states(new, seed=i))
        ours(layer)
        theirs(record)
        assert_same(layer, record)


def test_cropping_much_gives_memory_back():
    layer = make_layer(keep_ratio=1, keep=None)
    layer.update(*states(1000))
    layer.crop(-990)
    assert layer.rows == layer.seen == 10
    assert layer.storages()[0].shape[2] < 100
    layer.update(*states(1))
    assert layer.kept_positions()[0, 0].tolist() == list(range(11))


# -- moves


def test_to_converts_what_is_held():
    layer = make_layer()
    layer.update(*states(50))
    positions, keys = layer.kept_positions(), layer.keys
    layer.to(None, torch.bfloat16)
    assert layer.keys.dtype == layer.values.dtype == layer.dtype == torch.bfloat16
    assert torch.equal(layer.keys, keys.to(torch.bfloat16))
    assert torch.equal(layer.kept_positions(), positions)
    with pytest.raises(ValueError, match=r"dtype of the cache \(torch\.bfloat16\), got torch\.float32"):
        layer.update(*states(1))
    layer.update(*states(1, dtype=torch.bfloat16))
    layer.to(torch.device("meta"), None)
    assert layer.device.type == "meta"


def test_offload_and_prefetch_change_nothing():
    layer = make_layer()
    layer.offload()
    layer.update(*states(50))
    before = layer.keys.clone()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, before)


# -- refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (states(1, batch=3), r"key states must agree with the cache in batch size \(2\), got shape \[3, 2, 1, 8\]"),
        (states(1, heads=1), r"key states must agree with the cache in number of heads \(2\), got .*\[2, 1, 1, 8\]"),
        (states(1, dims=(4, 6)), r"key states must agree with the cache in head dim \(8\), got shape \[2, 2, 1, 4\]"),
        (states(1, dims=(8, 8)), r"value states must agree with the cache in head dim \(6\), got shape \[2, 2, 1, 8\]"),
        (states(1, dtype=torch.float64), r"key states must have the dtype .* \(torch.float32\), got torch.float64"),
        ((states(1)[0], states(2)[1]), r"must agree in \[B, H, n\], dtype and device, got \[2, 2, 1, 8\].*2, 2, 6"),
        ((states(1)[0][0], states(1)[1]), r"key states must have 4 dimensions \[B, H, n, D\], got shape \[2, 1, 8\]"),
        ((states(1)[0].long(), states(1)[1].long()), r"key states must be float16, .* got torch.int64"),
        (tuple(x.to("meta") for x in states(1)), r"key states must have the device of the cache \(cpu\), got meta"),
        (tuple(x.requires_grad_() for x in states(1)), r"no gradient history"),
    ],
)  # fmt: skip
def test_states_unlike_those_held_are_refused(wrong, message):
    layer = make_layer()
    layer.update(*states(30))
    before = layer.keys.clone(), layer.seen, layer.rows
    with pytest.raises((ValueError, RuntimeError), match=message):
        layer.update(*wrong)
    assert torch.equal(layer.keys, before[0])
    assert (layer.seen, layer.rows) == before[1:]


def test_gradients_are_fine_where_they_are_not_recorded():
    layer = make_layer()
    with torch.no_grad():
        layer.update(*(x.requires_grad_() for x in states(30)))
    assert not layer.keys.requires_grad
