"""Saved, loaded and copied caches go on exactly as if nothing had happened; files that do not fit are refused."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV32Config
from transformers.cache_utils import DynamicIndexedLayer

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache
from lagkv_ext.cache.layer_state import state_of
from tests.cache.families import DECODERS, decoder
from tests.cache.models import KINDS, SMALL, forward, full_layers, generate, prompt, tiny_config, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


def saved_and_loaded(cache, model, directory):
    path = directory / "prefix.safetensors"
    cache.save(path)
    return type(cache).load(path, model.config)


def same_rows(a, b):
    return all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
        for x, y in zip(a.layers, b.layers, strict=True)
        if getattr(x, "keys", None) is not None
    )


def of_report(cache):
    """Fields of a report but the room behind the rows."""
    return [
        (x.kind, x.tokens_seen, x.tokens_kept, x.bytes_uncompressed, x.compressions)
        for x in cache.report().layers
        if x.kind in ("lagkv", "full")
    ]


# -- goes on as if never saved


@given(
    kind=st.sampled_from(KINDS),
    before=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    after=st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=12),
    keeps=st.tuples(*[st.integers(1, 8)] * 4),
    score=st.sampled_from(["std", "cosine", "blend"]),
    options=st.sampled_from([{}, {"smooth": 3}, {"budget": "head"}, {"smooth": 5, "budget": "head"}]),
    max_tokens=st.one_of(st.none(), st.integers(28, 60)),
    batch=st.integers(1, 2),
    quantization=st.sampled_from([None, "int8", "int4", "fp8"]),
)
def test_any_split_goes_on_as_if_never_saved(
    directory, kind, before, after, keeps, score, options, max_tokens, batch, quantization
):
    """The states are given, so that everything must be equal bit by bit."""
    config = tiny_config(kind)
    keeps = [min(x, 7) for x in keeps] if max_tokens else keeps
    cache = LagKVCache(
        config,
        keep=min(keeps),
        layer_keep_ratio={i: min((keeps[i] + 0.5) / 8, 1.0) for i in full_layers(kind)},
        score=score,
        value_weight=0.7,
        max_tokens=max_tokens,
        quantization=quantization,
        **options,
        **SMALL,
    )
    generator = torch.Generator().manual_seed(sum(before))

    def feed(caches, new):
        returned = []
        for x in caches:
            x.set_attention_mask(None)
        for i in range(len(cache.layers)):
            key, value = (torch.randn(batch, 2, new, 16, generator=generator) for _ in range(2))
            returned.append([x.update(key, value, i) for x in caches])
        return returned

    for new in before:
        feed([cache], new)
    cache.save(directory / "split.safetensors")
    loaded = LagKVCache.load(directory / "split.safetensors", config)
    copied = cache.copy()
    assert loaded.kept_hash() == copied.kept_hash() == cache.kept_hash()
    for new in after:
        assert [loaded.get_mask_sizes(new, i) for i in range(len(cache.layers))] == [
            cache.get_mask_sizes(new, i) for i in range(len(cache.layers))
        ]
        for alone, *others in feed([cache, loaded, copied], new):
            for other in others:
                assert torch.equal(alone[0], other[0])
                assert torch.equal(alone[1], other[1])
    assert loaded.kept_hash() == copied.kept_hash() == cache.kept_hash()
    assert of_report(loaded) == of_report(copied) == of_report(cache)
    assert same_rows(cache, loaded)
    assert same_rows(cache, copied)


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_goes_on_from_a_file(family, directory):
    model = decoder(family, torch.float64)
    cache, rest = LagKVCache(model.config, keep=2, **SMALL), prompt(24, batch=2, seed=1)
    forward(model, cache, prompt(47, batch=2), [40, *[1] * 7])
    loaded = saved_and_loaded(cache, model, directory)
    logits = [forward(model, x, rest, [9, *[1] * 15]) for x in (cache, loaded)]
    torch.testing.assert_close(logits[1], logits[0], **EXACT)
    assert loaded.kept_hash() == cache.kept_hash()


def test_a_prompt_is_read_once_and_generated_from_many_times(directory):
    model = tiny_model("gemma3", "sdpa", torch.float64)
    prefix, ids = LagKVCache(model.config, keep=2, **SMALL), prompt(60)
    forward(model, prefix, ids, [60])
    prefix.save(directory / "prefix.safetensors")
    for seed in (1, 2):
        turn = torch.cat([ids, prompt(9, seed=seed)], dim=1)
        outputs = [
            generate(model, turn, cache)
            for cache in (prefix.copy(), LagKVCache.load(directory / "prefix.safetensors", model.config))
        ]
        alone = LagKVCache(model.config, keep=2, **SMALL)
        forward(model, alone, ids, [60])
        outputs.append(generate(model, turn, alone))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[2])
    assert prefix.get_seq_length() == 60


def test_a_compression_that_is_due_is_run_before_saving(directory):
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, cache, prompt(20), [19, 1])  # the 20th token sets it off: it would run with the next step
    loaded = saved_and_loaded(cache, model, directory)
    assert loaded.layers[0].keys.shape[2] == 14
    assert loaded.report().layers[0].compressions == 1


@pytest.mark.parametrize("family", ["gemma3", "LFM2"])
def test_recording_for_assisted_decoding_is_not_saved(directory, family):
    """It is a mode of the request that was saved, not of the one that goes on from the file."""
    model = tiny_model(family, "sdpa", torch.float64) if family in KINDS else decoder(family, torch.float64)
    recording, plain = (LagKVCache(model.config, keep=2, **SMALL) for _ in range(2))
    recording.activate_past_recording()
    for cache in (recording, plain):
        forward(model, cache, prompt(50), [50])
    loaded = saved_and_loaded(recording, model, directory)
    assert not any(getattr(layer, "record_past", False) for layer in loaded.layers)
    for cache in (loaded, plain):
        forward(model, cache, prompt(20, seed=1), [1] * 20)
    assert loaded.kept_hash() == plain.kept_hash()
    assert same_rows(plain, loaded)


def test_crop_knows_what_is_recent_after_loading(directory):
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, cache, prompt(45), [45])
    loaded = saved_and_loaded(cache, model, directory)
    with pytest.raises(ValueError, match="only the last 9"):
        loaded.crop(-10)
    loaded.crop(-9)
    assert loaded.get_seq_length() == 36


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_dtype_and_an_empty_cache(dtype, directory):
    model = tiny_model("gemma3", "sdpa", dtype)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    assert saved_and_loaded(cache, model, directory).get_seq_length() == 0
    forward(model, cache, prompt(60), [60])
    loaded = saved_and_loaded(cache, model, directory)
    assert loaded.layers[1].keys.dtype == dtype
    assert same_rows(cache, loaded)
    assert torch.equal(generate(model, prompt(70), loaded), generate(model, prompt(70), cache))


def test_the_file_holds_the_rows_that_stayed_and_no_more(directory):
    model = tiny_model("llama")
    cache = LagKVCache(model.config, keep=2, **SMALL)
    forward(model, cache, prompt(100), [100, *[1] * 0])
    cache.save(directory / "size.safetensors")
    tensors = load_file(directory / "size.safetensors")
    assert sum(x.nbytes for x in tensors.values()) == cache.report().bytes_held
    assert [x.name for x in directory.iterdir() if "unfinished" in x.name] == []


# -- what does not fit


def saved(directory, kind="llama", **settings):
    model = tiny_model(kind)
    cache = LagKVCache(model.config, **{"keep": 2, **SMALL, **settings})
    forward(model, cache, prompt(60), [60])
    path = directory / f"{kind}.safetensors"
    cache.save(path)
    return path, model.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 3}, r"layer 0: it was made with other settings: keep 2 \(asked for: 3\)"),
        ({"lag_size": 16, "keep": 2}, r"other settings: lag_size 8 \(asked for: 16\)"),
        ({"score": "cosine"}, r"score 'std' \(asked for: 'cosine'\)"),
        ({"max_tokens": 50}, r"max_tokens None \(asked for: 50\)"),
        (
            {"keep": 2, "skip_layers": [1]},
            r"layer 1: it was made with other settings: keep 2 \(asked for: 8\)",
        ),
        ({"keep": 9}, "cannot be loaded with these settings: keep must be at most lag_size"),
    ],
)
def test_other_settings_are_refused(directory, settings, message):
    path, config = saved(directory)
    with pytest.raises(ValueError, match=message):
        LagKVCache.load(path, config, **settings)
    LagKVCache.load(path, config, keep=2, score="std", **SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"saved for another model: num_key_value_heads 2 \(here: 4\)"),
        ({"head_dim": 8}, r"head_dim 16 \(here: 8\)"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers 3 \(here: 2\)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "another model: rope_parameters"),
    ],
)
def test_another_model_is_refused(directory, changes, message):
    path, config = saved(directory)
    other = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(other, name, value)
    with pytest.raises(ValueError, match=message):
        LagKVCache.load(path, other)
    with pytest.raises(ValueError, match=r"model_type 'llama' \(here: 'qwen3'\)"):
        LagKVCache.load(path, tiny_config("qwen3"))


def test_a_file_cut_anywhere_is_refused(directory):
    path, config = saved(directory)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
            LagKVCache.load(path, config)
    path.write_bytes(whole)
    LagKVCache.load(path, config)
    with pytest.raises(FileNotFoundError):
        LagKVCache.load(directory / "none.safetensors", config)


def rewritten(path, change):
    """The same file with ``change(tensors, about, metadata)``."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, about = load_file(path), json.loads(metadata["cache"])
    change(tensors, about, metadata)
    save_file(
        tensors, path, {"cache": json.dumps(about), **{k: v for k, v in metadata.items() if k != "cache"}}
    )


def with_order(path, order):
    rewritten(
        path, lambda t, a, m: [x["settings"].update(order=order) for x in a["layers"] if "settings" in x]
    )


def test_the_order_of_old_files(directory):
    path, config = saved(directory, "gemma3")
    expected = LagKVCache.load(path, config).kept_hash()
    with_order(path, "use_then_compress")
    assert LagKVCache.load(path, config).kept_hash() == expected
    with_order(path, "compress_then_use")
    with pytest.raises(ValueError, match=r"layer 1: order must be .*, got 'compress_then_use'"):
        LagKVCache.load(path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a, m: m.pop("format"), "is no saved cache: its format is None"),
        (lambda t, a, m: m.update(version="2"), "has version 2 of the format, this library reads 1"),
        (lambda t, a, m: a.pop("layers"), "do not describe a model and layers"),
        (lambda t, a, m: a["layers"].pop(), "has 3 layers, this model has 4"),
        (lambda t, a, m: t.pop("layers.1.value"), "layer 1: value is missing"),
        (lambda t, a, m: t.pop("layers.3.chosen"), "layer 3: it was compressed 1 times, and has no chosen rows"),
        (lambda t, a, m: t.update({"layers.1.more": torch.zeros(1)}), r"layer 1: it has tensors .* \['more'\]"),
        (lambda t, a, m: t.update({"layers.9.key": torch.zeros(1)}), r"tensors of no layer: \['layers.9.key'\]"),
        (lambda t, a, m: t["layers.1.chosen"].fill_(5), "layer 1: chosen must hold ascending positions from 4 to 59"),
        (lambda t, a, m: t.update({"layers.1.chosen": t["layers.1.chosen"].long()}), "layer 1: chosen must be int32"),
        (lambda t, a, m: t.update({"layers.1.key": t["layers.1.key"][:, :, 1:].clone()}), "key and value must agree"),
        (lambda t, a, m: a["layers"][1].update(rows=70), "layer 1: it should have 70 rows"),
        (lambda t, a, m: a["layers"][1].update(seen=3), "layer 1: its numbers cannot be: seen 3"),
        (lambda t, a, m: a["layers"][1].update(start=-1), "layer 1: start must be a number of tokens, got -1"),
        (lambda t, a, m: a["layers"][0].update(window=9), "layer 0: it has a window of 9 tokens, .* one of 12"),
        (lambda t, a, m: a["layers"][0].update(seen=5), "layer 0: it has 11 rows after 5 tokens"),
        (lambda t, a, m: a["layers"][0].update(kind="LagKVLayer"), "layer 0: it is a LagKVLayer, this model has"),
        (
            lambda t, a, m: t.update({"layers.0.key": t["layers.0.key"].repeat(2, 1, 1, 1)}),
            r"its layers have batch sizes \[1, 2\]",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(directory, change, message):
    path, config = saved(directory, "gemma3")
    path_of_copy = directory / "damaged.safetensors"
    path_of_copy.write_bytes(path.read_bytes())
    rewritten(path_of_copy, change)
    with pytest.raises(ValueError, match=message):
        LagKVCache.load(path_of_copy, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a, m: t.pop("layers.0.key_scale"), "layer 0: key_scale missing"),
        (lambda t, a, m: t.update({"layers.0.key_codes": t["layers.0.key_codes"][..., 1:].clone()}),
         r"layer 0: its codes must be torch.uint8 \[1, 2, 16, 8\]"),
        (lambda t, a, m: t.update({"layers.0.value_scale": t["layers.0.value_scale"].half()}),
         "layer 0: its scales must be torch.float32"),
    ],
)  # fmt: skip
def test_damaged_codes_are_refused(directory, change, message):
    path, config = saved(directory, "llama", quantization="int4")
    with pytest.raises(ValueError, match="quantization 'int4'"):
        LagKVCache.load(path, config, quantization="int8")
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        LagKVCache.load(path, config)


def test_another_files_contents_are_refused(directory):
    save_file({"weight": torch.zeros(3)}, directory / "weights.safetensors")
    with pytest.raises(ValueError, match="is no saved cache: its format is None"):
        LagKVCache.load(directory / "weights.safetensors", tiny_config("llama"))


def test_layers_and_caches_that_cannot_be_saved_say_so(directory):
    with pytest.raises(
        ValueError, match="a DynamicIndexedLayer cannot be saved; layers that can be: LagKVLayer"
    ):
        state_of(DynamicIndexedLayer())
    with pytest.raises(
        ValueError, match="latent attention"
    ):  # the model that has such layers is refused before
        LagKVCache(DeepseekV32Config())
    bart = LagKVEncoderDecoderCache(decoder_config := _bart(), keep=2, **SMALL)
    assert decoder_config.is_encoder_decoder
    with pytest.raises(ValueError, match="encoder-decoder model cannot be saved"):
        bart.self_attention_cache.save(directory / "bart.safetensors")
    assert not (directory / "bart.safetensors").exists()
    model, ids = tiny_model("llama"), prompt(50, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    padded = LagKVCache(model.config, keep=2, **SMALL)
    generate(model, ids, padded, attention_mask=mask)
    with pytest.raises(ValueError, match="a padded batch cannot be saved"):
        padded.save(directory / "padded.safetensors")
    assert padded.copy().kept_hash() == padded.kept_hash()


def _bart():
    from transformers import BartConfig

    return BartConfig(decoder_layers=1, encoder_layers=1)
