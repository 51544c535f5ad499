"""LagKVCache in every family of models: tiny random ones, compared with the uncompressed cache and the operators."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache
from lagkv_ext.cache.keyword import cache_argument
from tests.cache.families import DECODERS, ENCODER_DECODERS, decoder, encoder_decoder
from tests.cache.models import SMALL, forward, generate, prompt

LAG_SIZE, SINK = SMALL["lag_size"], SMALL["sink_size"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record_states(cache):
    """The states that every compressed layer is given from now on, one pair per step."""
    states = {i: [] for i in cache.compressed_layers}

    def watch(update, seen):
        def watched(key, value, *args, **kwargs):
            seen.append((key.clone(), value.clone()))
            return update(key, value, *args, **kwargs)

        return watched

    for i, seen in states.items():
        cache.layers[i].update = watch(cache.layers[i].update, seen)
    return states


def compress_directly(steps, keep):
    """Keys, values and positions that the operator leaves of these steps, and how many rows it ever chose."""
    rows, positions, start = None, None, SINK
    for new in steps:
        rows = new if rows is None else tuple(torch.cat(x, dim=2) for x in zip(rows, new, strict=True))
        arrived = torch.arange(new[0].shape[2], dtype=torch.int32).expand(new[0].shape[:3])
        arrived = arrived if positions is None else arrived + positions[:, :, -1:] + 1
        positions = arrived if positions is None else torch.cat([positions, arrived], dim=2)
        count = (rows[0].shape[2] - start) // LAG_SIZE - 1
        if count >= 1:
            key, value, index = torch.ops.lagkv.compress(*rows, start, LAG_SIZE, keep)
            rows, positions = (key, value), positions.gather(2, index.long())
            start += count * keep
    return *rows, positions, start - SINK


def assert_kept(cache, states, keep):
    assert states
    for i, steps in states.items():
        key, value, positions, _ = compress_directly(steps, keep)
        assert torch.equal(cache.kept_positions(i), positions)
        assert torch.equal(cache.layers[i].keys, key)
        assert torch.equal(cache.layers[i].values, value)


@pytest.mark.parametrize("family", DECODERS)
def test_keep_ratio_1_generates_what_the_uncompressed_cache_generates(family):
    model, ids = decoder(family), prompt(50, batch=2)
    expected = generate(model, ids, DynamicCache(config=model.config))
    cache = LagKVCache(model.config, keep_ratio=1, **SMALL)
    assert torch.equal(generate(model, ids, cache), expected)
    assert cache.report().tokens_kept == cache.get_seq_length() == 79
    assert len(set(expected[0, 50:].tolist())) > 3  # not one token for ever


@pytest.mark.parametrize("family", DECODERS)
def test_generate_keeps_what_the_operator_keeps_of_the_states(family):
    model, ids, keep = decoder(family), prompt(50, batch=2), 2
    cache = LagKVCache(model.config, keep=keep, **SMALL)
    assert cache.compressed_layers == tuple(DECODERS[family][2])
    states = record_states(cache)
    generate(model, ids, cache)
    assert all([x.shape[2] for x, _ in steps] == [50, *[1] * 29] for steps in states.values())
    assert_kept(cache, states, keep)
    assert min(cache.report().layers[i].compressions for i in states) >= 3


@pytest.mark.parametrize("family", DECODERS)
def test_memory_as_computed(family):
    """After a prompt: the rows of docs/method.md 3 and the positions of the chosen ones; other layers as ever."""
    model, keep = decoder(family), 2
    cache, full = LagKVCache(model.config, keep=keep, **SMALL), DynamicCache(config=model.config)
    states = record_states(cache)
    forward(model, cache, prompt(61, batch=2), [61])
    forward(model, full, prompt(61, batch=2), [61])
    dropped = (61 - SINK) // LAG_SIZE - 1
    rows, chosen = 61 - dropped * (LAG_SIZE - keep), dropped * keep
    for layer, uncompressed in zip(cache.report().layers, full.layers, strict=True):
        beside = sum(x.nbytes for x in _linear_states(uncompressed))
        keys, values = getattr(uncompressed, "keys", None), getattr(uncompressed, "values", None)
        per_row = 0 if keys is None else 2 * keys.shape[1] * (keys.shape[3] + values.shape[3]) * 4
        if layer.layer in states:
            heads = states[layer.layer][0][0].shape[1]
            assert (layer.tokens_seen, layer.tokens_kept) == (61, rows)
            assert layer.bytes_held == rows * per_row + 2 * heads * chosen * 4 + beside
            assert layer.bytes_uncompressed == 61 * per_row + beside
        elif per_row:  # a sliding window, which transformers cuts out of the prompt's states
            assert layer.tokens_kept == keys.shape[2] == 11
            assert layer.bytes_held == keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()
        else:
            assert layer.bytes_held == beside


def _linear_states(layer):
    states = (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
    return [x for s in states for x in s.values() if x is not None]


@pytest.mark.parametrize("family", DECODERS)
def test_several_tokens_after_a_compression_stay_causal(family):
    """6 tokens at once give the logits of 6 times one token."""
    model, ids = decoder(family, torch.float64), prompt(45 + 6, batch=2)
    logits = []
    for rest in ([6], [1] * 6):
        cache = LagKVCache(model.config, keep=3, **SMALL)
        logits.append(forward(model, cache, ids, [45, *rest]))
        assert {cache.report().layers[i].compressions for i in cache.compressed_layers} == {1}
    # Eager attention and the linear layers compute partly in float32.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["Falcon-H1", "Qwen3-Next", "LFM2"])
def test_beams_carry_the_linear_states_too(family):
    model, ids = decoder(family), prompt(40, batch=2)
    options = {"num_beams": 3, "num_return_sequences": 2, "new": 12}
    expected = generate(model, ids, DynamicCache(config=model.config), **options)
    full = LagKVCache(model.config, keep_ratio=1, **SMALL)
    assert torch.equal(generate(model, ids, full, **options), expected)


@pytest.mark.parametrize("family", ["Falcon-H1", "Qwen3-Next", "LFM2"])
def test_reset_forgets_the_linear_states_too(family):
    model = decoder(family)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    first = forward(model, cache, prompt(60), [40, *[1] * 20])
    cache.reset()
    assert cache.get_seq_length() == 0
    again = forward(model, cache, prompt(60), [40, *[1] * 20])
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_layers_with_both_kinds_of_attention_repeat_select_and_count_both():
    model = decoder("Falcon-H1", torch.float64)
    cache = LagKVCache(model.config, keep=2, **SMALL)
    ids, rest = prompt(40), prompt(6, batch=3, seed=1)
    forward(model, cache, ids, [40])
    layer = cache.layers[0]
    assert isinstance(layer, LinearAttentionLayer)
    assert isinstance(layer, CacheLayerMixin)
    cache.batch_repeat_interleave(3)
    assert layer.conv_states[0].shape[0] == layer.recurrent_states[0].shape[0] == layer.keys.shape[0] == 3
    cache.batch_select_indices(torch.tensor([2, 0]))
    logits = forward(model, cache, rest[[2, 0]], [1] * 6)
    for row, b in enumerate((2, 0)):
        alone = LagKVCache(model.config, keep=2, **SMALL)
        expected = forward(model, alone, torch.cat([ids, rest[b : b + 1]], dim=1), [40, *[1] * 6])[:, 40:]
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)


# -- encoder-decoder models


def translate(model, ids, cache, new=60):
    return model.generate(
        ids, **cache_argument(cache), max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1
    )


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoder_with_keep_ratio_1(family):
    model, ids = encoder_decoder(family), prompt(20, batch=2)
    config = model.config
    expected = translate(
        model, ids, EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    )
    cache = LagKVEncoderDecoderCache(config, keep_ratio=1, **SMALL)
    assert torch.equal(translate(model, ids, cache), expected)
    assert cache.report().tokens_kept == cache.get_seq_length() == 60


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoder_compresses_self_attention_alone(family):
    model, ids = encoder_decoder(family), prompt(20, batch=2)
    cache = LagKVEncoderDecoderCache(model.config, keep=2, **SMALL)
    states = record_states(cache.self_attention_cache)
    translate(model, ids, cache)
    assert_kept(cache.self_attention_cache, states, 2)
    assert {x.compressions for x in cache.report().layers} == {6}
    full = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    translate(model, ids, full, new=1)
    for layer, expected in zip(
        cache.cross_attention_cache.layers, full.cross_attention_cache.layers, strict=True
    ):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)


def test_a_padded_text_for_the_encoder_is_none_for_the_decoder():
    model, ids = encoder_decoder("BART"), prompt(20, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    full = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    expected = model.generate(ids, **cache_argument(full), **options)
    cache = LagKVEncoderDecoderCache(model.config, keep_ratio=1, **SMALL)
    assert torch.equal(model.generate(ids, **cache_argument(cache), **options), expected)
    texts = []
    for x, x_mask in ((ids, mask), (ids[1:, :12], mask[1:, :12])):
        cache = LagKVEncoderDecoderCache(model.config, keep=2, **SMALL)
        texts.append(model.generate(x, **cache_argument(cache), **{**options, "attention_mask": x_mask}))
        assert {layer.compressions for layer in cache.report().layers} == {6}
    assert torch.equal(texts[0][1:], texts[1])


def test_encoder_decoder_beams():
    model, ids = encoder_decoder("BART"), prompt(20, batch=2)
    caches = (
        EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config)),
        LagKVEncoderDecoderCache(model.config, keep_ratio=1, **SMALL),
        LagKVEncoderDecoderCache(model.config, keep=2, **SMALL),
    )
    full, same, compressed = (
        model.generate(ids, **cache_argument(x), max_new_tokens=40, num_beams=3, do_sample=False)
        for x in caches
    )
    assert torch.equal(same, full)
    assert compressed.shape == full.shape


def test_whisper():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=20,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    sound, tokens = torch.randn(2, 8, 40), prompt(60, batch=2)
    caches = (
        EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        LagKVEncoderDecoderCache(config, keep_ratio=1, **SMALL),
        LagKVEncoderDecoderCache(config, keep=2, **SMALL),
    )
    states, logits = record_states(caches[2].self_attention_cache), []
    for cache in caches:
        with torch.no_grad():
            parts = [
                model(input_features=sound, decoder_input_ids=x, **cache_argument(cache)).logits
                for x in tokens.split([40, *[1] * 20], dim=1)
            ]
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert_kept(caches[2].self_attention_cache, states, 2)


# -- what is refused, and why


@pytest.mark.parametrize(
    ("config", "cache", "message"),
    [
        ("BartConfig", LagKVCache, "cross-attention needs a cache of its own: use LagKVEncoderDecoderCache"),
        ("T5Config", LagKVEncoderDecoderCache, "attention bias from row numbers of the cache"),
        ("T5Gemma2Config", LagKVEncoderDecoderCache, "merges the rows of its encoder into self-attention"),
        ("MoonshineConfig", LagKVEncoderDecoderCache, "can be served are bart, .* marian, .* whisper"),
        ("LlamaConfig", LagKVEncoderDecoderCache, "is no encoder-decoder model: use LagKVCache"),
        ("DeepseekV3Config", LagKVCache, "latents that all heads share, which LagKV does not score"),
        ("DeepseekV2Config", LagKVCache, "latents that all heads share, which LagKV does not score"),
        ("Mistral4Config", LagKVCache, "latents that all heads share, which LagKV does not score"),
        ("BloomConfig", LagKVCache, "bias from row numbers"),
        ("MambaConfig", LagKVCache, "no full-attention layer that could be compressed"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(config, cache, message):
    with pytest.raises(ValueError, match=message):
        cache(getattr(transformers, config)())


def test_mistral_whose_layers_all_slide_has_nothing_to_compress():
    config = transformers.MistralConfig(sliding_window=12, num_hidden_layers=2)
    with pytest.raises(ValueError, match="the caches of its 2 layers are DynamicSlidingWindowLayer"):
        LagKVCache(config)


def test_what_a_latent_cache_holds():
    """Why multi-head latent attention is refused: one row of latents for all heads, made into keys and values later."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    cache = DynamicCache(config=config)
    forward(transformers.DeepseekV3ForCausalLM(config).eval(), cache, prompt(10), [10])
    assert (cache.layers[0].keys.shape, cache.layers[0].values.shape) == ((1, 1, 10, 24), (1, 1, 10, 8))
