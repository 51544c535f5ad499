"""Quantised rows: the error of a row, that the same tokens stay, that codes move and are never made twice, bytes."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext import LagKVCache
from lagkv_ext.cache.compression.plan import plan
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.quantized.quantizer import FORMATS, group_size, quantize, scale_dtype
from lagkv_ext.cache.report import storage_bytes
from lagkv_ext.cache.settings import layer_settings
from tests.cache.families import decoder
from tests.cache.models import KINDS, SMALL, forward, full_layers, generate, prompt, tiny_config, tiny_model

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- rows


@st.composite
def rows(draw):
    """Rows whose channels differ by orders of magnitude, with zeros among them."""
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 70)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(shape, generator=generator) * 10 ** (6 * torch.rand(shape[3], generator=generator) - 3)
    x = torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5])), 0, x)
    return x.to(draw(st.sampled_from(DTYPES)))


@given(x=rows(), form=st.sampled_from(FORMATS))
def test_error_of_a_row(x, form):
    coded = quantize(x, form)
    back = coded.dequantize()
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    scale = coded.scale.double().repeat_interleave(group_size(x.shape[3]), dim=3)
    exact = x.double()
    bound = scale / 2 if form != "fp8" else torch.maximum(exact.abs() / 16, scale / 1024)
    rounding = torch.finfo(x.dtype).eps * (exact.abs() + bound) + torch.finfo(x.dtype).smallest_normal
    assert bool(((back.double() - exact).abs() <= bound * (1 + 1e-6) + rounding).all())
    # A group is as precise as its largest channel allows, not the row.
    most = exact.abs().unflatten(3, (-1, group_size(x.shape[3]))).amax(dim=4)
    limit = {"int8": 127, "int4": 7, "fp8": 448}[form]
    torch.testing.assert_close(coded.scale.double(), most / limit, rtol=2**-8, atol=1e-37)


@given(x=rows(), form=st.sampled_from(FORMATS))
def test_every_row_is_quantised_by_itself(x, form):
    coded, alone = quantize(x, form), [quantize(row, form) for row in x.split(1, dim=2)]
    for i, row in enumerate(alone):
        assert torch.equal(coded.codes[:, :, i : i + 1], row.codes)
        assert torch.equal(coded.scale[:, :, i : i + 1], row.scale)
    assert torch.equal(coded.joined(coded).dequantize(), torch.cat([coded.dequantize()] * 2, dim=2))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_harms_no_other_group(form, bad):
    x = torch.randn(1, 1, 3, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1, 40] = bad
    back = quantize(x, form).dequantize()
    assert bool(back[0, 0, 1, 32:].isnan().all())
    assert back.isnan().sum() == 32


def test_bytes_of_a_row():
    x = torch.randn(2, 3, 5, 96).bfloat16()
    for form, expected in (("int8", 96 + 6), ("fp8", 96 + 6), ("int4", 48 + 6)):
        coded = quantize(x, form)
        assert storage_bytes(coded.storages) == 2 * 3 * 5 * expected
    assert quantize(x[..., :7], "int4").codes.shape[3] == 4
    assert [scale_dtype(x) for x in DTYPES] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64]


# -- a layer


def settings(form="int4", **changes):
    values = {
        "lag_size": 8,
        "keep": 3,
        "keep_ratio": None,
        "sink_size": 4,
        "value_weight": 1.0,
        "score": "std",
    }
    return layer_settings(**{**values, "quantization": form, **changes})


def states(new, seed, dtype=torch.float32, dims=(8, 6)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, new, dim, generator=generator).to(dtype) for dim in dims)


def at(all_states, positions):
    """Rows of the states ``[B, H, N, D]`` at ``positions [B, H, rows]``."""
    return all_states.gather(2, positions.long()[..., None].expand(*positions.shape, all_states.shape[3]))


def assert_holds(layer, given_states):
    """Every row is the one that was given, through its codes once, or untouched where it is recent."""
    positions, coded = layer.kept_positions(), layer.quantized_rows
    if layer.settings.compresses:
        assert coded == (layer.rows - layer.tracks[0].recent if layer.compressions else 0)
    for i, (held, given_rows) in enumerate(zip((layer.keys, layer.values), given_states, strict=True)):
        original = at(given_rows, positions)
        assert torch.equal(held[:, :, coded:], original[:, :, coded:])
        if coded:
            through = quantize(original[:, :, :coded], layer.settings.quantization)
            assert torch.equal(held[:, :, :coded], through.dequantize())
            assert torch.equal(layer.held.codes[i].codes, through.codes)
            assert torch.equal(layer.held.codes[i].scale, through.scale)


@given(
    form=st.sampled_from(FORMATS),
    score=st.sampled_from(["std", "cosine", "blend"]),
    budget=st.sampled_from(["partition", "head"]),
    room=st.one_of(st.none(), st.integers(0, 20)),
    lag_size=st.integers(1, 9),
    keep=st.integers(1, 9),
    sink_size=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    steps=st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=30),
)
def test_the_same_tokens_stay_as_without_quantisation(
    form, score, budget, room, lag_size, keep, sink_size, dtype, steps
):
    keep = min(keep, lag_size)
    shared = {
        "lag_size": lag_size, "keep": keep, "sink_size": sink_size, "score": score, "budget": budget
    }  # fmt: skip
    if (
        budget == "head" and room is not None and keep < lag_size
    ):  # carried scores are those of the rows as they came
        shared["max_tokens"] = sink_size + 2 * lag_size + keep + room
    layer, plain = LagKVLayer(settings(form, **shared)), LagKVLayer(settings(None, **shared))
    given_states = [x[:, :, :0] for x in states(1, 0, dtype)]
    for i, new in enumerate(steps):
        key, value = states(new, i, dtype)
        given_states = [torch.cat(x, dim=2) for x in zip(given_states, (key, value), strict=True)]
        assert layer.get_mask_sizes(new) == plain.get_mask_sizes(new)
        seen, expected = layer.update(key, value), plain.update(key, value)
        assert [x.shape for x in seen] == [x.shape for x in expected]
        for x, new_states in zip(seen, (key, value), strict=True):
            assert torch.equal(x[:, :, -new:], new_states)
        assert torch.equal(layer.kept_positions(), plain.kept_positions())
        assert_holds(layer, given_states)
    for i in range(3):  # drafts, of which some tokens are rejected
        for x in (layer, plain):
            x.activate_past_recording()
        key, value = states(9, 100 + i, dtype)
        for x in (layer, plain):
            x.update(key, value)
            x.crop(-4)
        given_states = [
            torch.cat([x, y[:, :, :5]], dim=2) for x, y in zip(given_states, (key, value), strict=True)
        ]
        assert torch.equal(layer.kept_positions(), plain.kept_positions())
        assert_holds(layer, given_states)
    assert layer.rows == plain.rows
    recent = layer.rows - layer.quantized_rows
    assert recent < 2 * lag_size + sink_size
    assert (layer.quantized_rows > 0) == (layer.compressions > 0) or keep >= lag_size


@given(
    form=st.sampled_from(FORMATS),
    keep=st.integers(1, 7),
    more=st.integers(0, 30),
    dtype=st.sampled_from(DTYPES),
    steps=st.lists(st.one_of(st.just(1), st.integers(1, 70)), min_size=1, max_size=8),
    decode=st.integers(0, 80),
)
def test_codes_that_are_scored_again_move_and_are_not_made_again(form, keep, more, dtype, steps, decode):
    """Under a budget: what is scored is what the codes stand for; every row still has the code that it was given."""
    layer = LagKVLayer(settings(form, keep=keep, max_tokens=20 + more))
    plain = LagKVLayer(settings(None, keep=keep, max_tokens=20 + more))
    given_states = [x[:, :, :0] for x in states(1, 0, dtype)]
    for i, new in enumerate([*steps, *[1] * decode]):
        key, value = states(new, i, dtype)
        given_states = [torch.cat(x, dim=2) for x in zip(given_states, (key, value), strict=True)]
        before = layer.kept_positions() if layer.is_initialized else None
        coded, start = layer.quantized_rows, layer.tracks[0].start
        passes = plan(layer.settings, layer.rows + new, layer.tracks[0].start).passes
        layer.update(key, value)
        plain.update(key, value)
        assert_holds(layer, given_states)
        assert (layer.rows, layer.tracks[0].start, layer.compressions) == (
            plain.rows,
            plain.tracks[0].start,
            plain.compressions,
        )
        if len(passes) == 1 and before is not None:
            arrived = torch.arange(layer.seen - new, layer.seen, dtype=torch.int32).expand(2, 2, new)
            positions = torch.cat([before, arrived], dim=2)
            held = [at(x, positions) for x in given_states]
            for x in held:
                x[:, :, :coded] = quantize(x[:, :, :coded], form).dequantize()
            index = torch.ops.lagkv.compress(*held, start, 8, keep)[2]
            assert torch.equal(layer.kept_positions(), positions.gather(2, index.long()))


@given(steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 7)), min_size=1, max_size=20))
def test_rejected_tokens_leave_no_trace(steps):
    layer, plain = LagKVLayer(settings("int8")), LagKVLayer(settings(None))
    layer.activate_past_recording()
    plain.activate_past_recording()
    given_states = [x[:, :, :0] for x in states(1, 0)]
    for i, (accepted, rejected) in enumerate(steps):
        key, value = states(accepted + rejected, i)
        for x in (layer, plain):
            x.update(key, value)
            x.crop(-rejected)
        given_states = [
            torch.cat([x, new[:, :, :accepted]], dim=2)
            for x, new in zip(given_states, (key, value), strict=True)
        ]
        assert torch.equal(layer.kept_positions(), plain.kept_positions())
        assert_holds(layer, given_states)


def test_crop_stops_at_quantised_rows():
    layer = LagKVLayer(settings("int8", keep=8))
    layer.update(*states(30, 0))
    assert (layer.rows, layer.quantized_rows) == (30, 22)
    with pytest.raises(ValueError, match="only the last 8 of the 30 tokens seen are held as they came"):
        layer.crop(-9)
    layer.crop(-8)
    assert layer.rows == 22


@pytest.mark.parametrize(("form", "share"), [("int4", 0.35), ("int8", 0.6), ("fp8", 0.6)])
@pytest.mark.parametrize("keep", [4, 16])
def test_bytes_after_a_long_text(form, share, keep):
    """Against the unquantised cache, which holds the same rows in bfloat16; all that is kept alive counts."""
    shared = {"lag_size": 16, "keep": keep}
    layer, plain = LagKVLayer(settings(form, **shared)), LagKVLayer(settings(None, **shared))
    for i in range(8):
        for x in (layer, plain):
            x.update(*states(500, i, torch.bfloat16, dims=(64, 64)))
    held = storage_bytes(layer.storages())
    assert held < share * storage_bytes(plain.storages())
    recent = layer.rows - layer.quantized_rows
    per_row = 2 * (64 + 4 if form != "int4" else 32 + 4)
    positions = 0 if layer.tracks[0].chosen is None else 4 * layer.tracks[0].chosen.shape[2]
    assert held == 2 * 2 * (layer.quantized_rows * per_row + recent * 2 * 64 * 2 + positions)
    assert layer.uncompressed_bytes() == 4000 * 2 * 2 * 128 * 2


# -- a model


@pytest.mark.parametrize("keep", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_differ_by_the_precision_of_the_rows(kind, keep):
    model, ids, chunks = tiny_model(kind, "sdpa", torch.float64), prompt(90, batch=2), [40, 9, *[1] * 20, 21]
    exact = forward(model, LagKVCache(model.config, keep=keep, **SMALL), ids, chunks)
    errors = {}
    for form in FORMATS:
        cache = LagKVCache(model.config, keep=keep, quantization=form, **SMALL)
        logits = forward(model, cache, ids, chunks)
        errors[form] = float((logits - exact).norm() / exact.norm())
        assert all(cache.layers[i].quantized_rows > 10 for i in full_layers(kind))
        assert torch.equal(logits[:, :40], exact[:, :40])  # the prompt sees its own states
    assert 0 < errors["int8"] < 0.1
    assert errors["int8"] < min(errors["fp8"], errors["int4"])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_beams_and_drafts(options):
    model = tiny_model("gemma3")
    ids = prompt(12).repeat(1, 4)
    texts = [
        generate(model, ids, LagKVCache(model.config, keep=2, quantization=form, **SMALL), **options)
        for form in (None, "int8", "int8")
    ]
    assert texts[0].shape == texts[1].shape
    assert torch.equal(texts[1], texts[2])


def test_beams_take_their_codes_with_them():
    model, ids, rest = tiny_model("llama", "sdpa", torch.float64), prompt(60), prompt(20, batch=3, seed=1)
    cache = LagKVCache(model.config, keep=2, quantization="int4", **SMALL)
    forward(model, cache, ids, [60])
    cache.batch_repeat_interleave(3)
    forward(model, cache, rest, [20])
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    for row, b in enumerate((2, 2, 0)):
        alone = LagKVCache(model.config, keep=2, quantization="int4", **SMALL)
        forward(model, alone, torch.cat([ids, rest[b : b + 1]], dim=1), [60, 20])
        assert torch.equal(cache.kept_positions(0)[row : row + 1], alone.kept_positions(0))
        torch.testing.assert_close(cache.layers[0].keys[row : row + 1], alone.layers[0].keys)


# -- refused


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="quantization must be 'int8' or 'int4' or 'fp8', got 'int2'"):
        LagKVCache(tiny_config("llama"), quantization="int2")
    with pytest.raises(ValueError, match="quantization='int8' is not possible in models whose layers"):
        LagKVCache(decoder("Falcon-H1").config, quantization="int8")
    model, ids = tiny_model("llama"), prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = LagKVCache(model.config, keep=2, quantization="int8", **SMALL)
    with pytest.raises(ValueError, match="padded batches are not served with quantization"):
        generate(model, ids, cache, attention_mask=mask)
    assert cache.get_seq_length() == 0
    forward(model, cache, ids, [30])
    with pytest.raises(ValueError, match=r"stays in the dtype that it was filled in \(torch.float32\)"):
        cache.to(dtype=torch.float16)
