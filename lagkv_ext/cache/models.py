"""Decides which models the caches serve or refuse, and which of a model's layers are never compressed.

A row may be dropped where attention sees the rows of a head as a set: every query sees every row, and neither the
number of a row nor the row of another head beside it counts. No configuration says that, so every family is judged: by
a field of its configuration where one tells, otherwise by its name, from what ``python -m tests.sweep`` measured.
A family that nobody judged is refused: see `admit`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lagkv_ext import arguments

_ROW_NUMBERS = (
    "derives an attention bias from row numbers of the cache ({}), which no longer are positions once tokens were "
    "dropped"
)
_MIXED_HEADS = (
    "{}: LagKV drops other rows in every head, so rows of different heads no longer belong together"
)
_NO_CACHE = "keeps no key-value cache of transformers: {}"
_NO_FULL_ATTENTION = "has no full-attention layer that could be compressed: {}"
_READS_ANOTHER = _NO_CACHE.format("it reads that of the model that it drafts for")

#: Families (``model_type``) refused by name, where no field of their configuration shows the reason.
REFUSED = {
    "bloom": _ROW_NUMBERS.format("ALiBi"),
    "blt": _NO_CACHE.format("it makes one for patches of bytes"),
    "deepseek_v4": _NO_FULL_ATTENTION.format("its caches hold compressed entries already"),
    "diffllama": _MIXED_HEADS.format("joins the values of two heads row by row"),
    "falcon_mamba": _NO_FULL_ATTENTION.format("it is recurrent"),
    "fsmt": "attends to later tokens where it is given several and a cache",
    "gemma4_assistant": _READS_ANOTHER,
    "gemma4_unified_assistant": _READS_ANOTHER,
    "led": "makes no mask for a single token, so a cache cannot see padding",
    "mamba": _NO_FULL_ATTENTION.format("it is recurrent"),
    "mamba2": _NO_FULL_ATTENTION.format("it is recurrent"),
    "minimax": _NO_CACHE.format("it makes a MiniMaxCache and takes no other"),
    "openai-gpt": _NO_CACHE.format("it reads the whole text in every step"),
    "moshi": _NO_FULL_ATTENTION.format("all its layers have a window"),
    "mpt": _ROW_NUMBERS.format("ALiBi"),
    "qwen4_exp": _NO_FULL_ATTENTION.format("it picks the rows to attend to by an index of all of them"),
    "qwen4_exp_text": _NO_FULL_ATTENTION.format("it picks the rows to attend to by an index of all of them"),
    "recurrent_gemma": _NO_FULL_ATTENTION.format("it is recurrent, and attends in a window"),
    "reformer": _NO_CACHE.format("it keeps buckets and states of its own"),
    "rwkv": _NO_CACHE.format("it is recurrent"),
    "t5gemma2": "merges the rows of its encoder into self-attention, under one mask",
    "xlm": _NO_CACHE.format("it attends to the whole text in every step"),
    "xlnet": _NO_CACHE.format("it keeps memories of its own"),
    "xlstm": _NO_CACHE.format("it is recurrent"),
}
#: Families refused where they have more than one head of keys and values.
_REFUSED_WITH_HEADS = {
    "doge": _MIXED_HEADS.format("derives a mask for every row from the values of all heads"),
}
#: Fields that a configuration has where attention is biased by row numbers.
_BIAS_FIELDS = {
    "relative_attention_num_buckets": "relative buckets",
    "relative_max_distance": "relative buckets",
    "position_bias_num_buckets": "relative buckets",
    "rel_extent": "relative logits",
}
#: Encoders, which attend to what comes later unless they are configured as decoders.
_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
#: Families of which the sweep found nothing but equal: docs/cache.md has its table.
_SERVED = """
    afmoe apertus apertus1p5_text arcee aria aria_text audioflamingo3 aya_vision bamba bart beam bert bert-generation
    big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small camembert codegen cohere cohere2 cohere2_moe
    cohere2_vision cohere_compass cohere_compass_text cosmos3_omni ctrl cwm data2vec-text dbrx deepseek_vl
    deepseek_vl_hybrid doge dory dots1 electra emu3 emu3_text_model ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone4_5
    exaone_moe falcon falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text git glm glm4 glm46v glm4_moe glm4v glm4v_text glm_ocr glm_ocr_text glmasr glmga
    got_ocr2 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_docling
    granite_docling_text granite_speech granite_speech_plus granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax hyperclovax_vision_v2 idefics2
    idefics3 internlm3 internvl iquestcoder jais2 jamba janus jetmoe kolibri1 kosmos-2.5 kosmos_2_5_text_model laguna
    lara_mini lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video
    llava_onevision marian mbart megatron-bert mellum mimo_v2_flash minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m2
    minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral mllama mllama_text_model
    modernbert-decoder moss_transcribe_diarize muse_glimmer muse_glimmer_text musicflamingo mvp nanochat nemo_speechlm
    nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe omniasr opt ovis2 paddleocr_vl paddleocr_vl_text paligemma
    pegasus persimmon phi phi3 phi4_multimodal phimoe plbart pp_chart2table qianfan_ocr qwen2 qwen2_5_omni_text
    qwen2_5_omni_thinker qwen2_5_vl qwen2_5_vl_text qwen2_audio qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_5
    qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_omni_moe_thinker
    qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text rembert roberta roberta-prelayernorm roc_bert roformer
    sarvam_moe seed_oss shieldgemma2 smollm3 smolvlm solar_open stablelm starcoder2 trocr vaultgemma video_llama_3
    video_llava vipllava voxtral whisper xglm xlm-roberta xlm-roberta-xl xmod zamba zamba2 zaya
"""
SERVED = frozenset(_SERVED.split())
#: Families that have no place for `LagKVStaticCache` alone.
_NOT_STATIC = {
    "gemma4_unified": "its masks look up the blocks of images by position, and positions go beyond the capacity",
}
#: Encoder-decoder families that LagKVEncoderDecoderCache serves.
ENCODER_DECODERS = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "nllb-moe",
    "pegasus", "pegasus_x", "plbart", "seamless_m4t", "seamless_m4t_v2", "t5_gemma_module", "t5gemma", "whisper",
)  # fmt: skip

_admitted: set[str] = set()


def admit(model_type: str) -> None:
    """Serve a family that this release does not know, on your word that its attention sees rows as a set.

    ``model_type`` is the one that the error names. In a checkout ``python -m tests.sweep --family NAME`` finds out for
    families of the installed transformers. Reasons for a refusal that show in a configuration still count.

    Raises:
        TypeError, ValueError: no name; a family that is known to go wrong.
    """
    arguments.text("model_type", model_type)
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} cannot be admitted: it {REFUSED[model_type]}")
    _admitted.add(model_type)


def check_config(config: Any, part_of_encoder_decoder: bool = False) -> None:
    """Refuse what is no configuration of transformers, and models that would go wrong or that nobody judged.

    Raises:
        TypeError: no configuration.
        ValueError: a model that is not served, with the reason.
    """
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        hint = " (pass model.config)" if isinstance(getattr(config, "config", None), PreTrainedConfig) else ""
        raise TypeError(f"config must be a transformers configuration, got {type(config).__name__}{hint}")
    text = config.get_text_config(decoder=True)
    families = list(dict.fromkeys([config.model_type, text.model_type]))
    model = f"{type(config).__name__} (model_type {' with '.join(map(repr, families))})"
    encoder_decoder = config.is_encoder_decoder or text.is_encoder_decoder
    for field, bias in _BIAS_FIELDS.items():
        if hasattr(text, field):
            kind = "is an encoder-decoder model that " if encoder_decoder else ""
            raise ValueError(f"{model} {kind}{_ROW_NUMBERS.format(bias)}")
    for family in families:
        if family in REFUSED:
            raise ValueError(f"{model} {REFUSED[family]}")
    if encoder_decoder:
        _check_encoder_decoder(families, model, part_of_encoder_decoder)
        return
    if part_of_encoder_decoder:
        raise ValueError(f"{model} is no encoder-decoder model: use LagKVCache")
    _check_fields(text, model)
    unknown = [family for family in families if family not in SERVED and family not in _admitted]
    if unknown:
        raise ValueError(
            f"{model} is of a family that this release of lagkv_ext has not judged ({', '.join(unknown)}): whether its "
            "attention sees cached rows as a set, so that rows may be dropped, does not show in a configuration. If "
            f"you know that it does, call lagkv_ext.cache.models.admit({unknown[0]!r}) first"
        )


def _check_encoder_decoder(families: list[str], model: str, part_of_encoder_decoder: bool) -> None:
    if not set(families) <= {*ENCODER_DECODERS, *_admitted}:
        raise ValueError(
            f"{model} is an encoder-decoder model; those that can be served are {', '.join(ENCODER_DECODERS)}"
        )
    if not part_of_encoder_decoder:
        raise ValueError(
            f"{model} is an encoder-decoder model, whose cross-attention needs a cache of its own: use "
            "LagKVEncoderDecoderCache"
        )


def _check_fields(text: Any, model: str) -> None:
    if text.model_type in _REFUSED_WITH_HEADS and text.num_key_value_heads > 1:
        raise ValueError(f"{model} {_REFUSED_WITH_HEADS[text.model_type]}")
    rank = next((x for x in _values(text, "kv_lora_rank") if x is not None), None)
    if rank is not None:
        raise ValueError(
            f"{model} has multi-head latent attention (kv_lora_rank={rank}): its cache holds latents that all heads "
            "share, which LagKV does not score"
        )
    if getattr(text, "alibi", False):
        raise ValueError(f"{model} {_ROW_NUMBERS.format('ALiBi')}")
    if getattr(text, "add_cross_attention", False):
        raise ValueError(
            f"{model} has cross-attention (add_cross_attention=True), whose rows are those of an encoder and need a "
            "cache of their own"
        )
    if text.model_type in _ENCODERS and not text.is_decoder:
        raise ValueError(
            f"{model} is an encoder, whose tokens attend to later ones: decoders of this family have is_decoder=True"
        )


def static_refusal(config: Any) -> str | None:
    """Why a model has no place for memory of a fixed size, where that shows in its configuration."""
    text = config.get_text_config(decoder=True)
    if config.model_type in _NOT_STATIC:
        return _NOT_STATIC[config.model_type]
    apart = sorted({*uncompressed_layers(config), *cross_attention_layers(config)})
    if apart:
        return f"layers {apart} attend to something else than all tokens"
    return _reads_past_update(text)


def ratios_refusal(config: Any) -> str | None:
    """Why the layers of a model cannot keep different numbers of tokens: each learns its mask in `update`."""
    return _reads_past_update(config.get_text_config(decoder=True))


def _reads_past_update(text: Any) -> str | None:
    if getattr(text, "recurrent_kv_cache_mode", None) == "last_loop":
        return "it reads rows of the cache past `update` (recurrent_kv_cache_mode='last_loop')"
    return None


def uncompressed_layers(config: Any) -> dict[int, str]:
    """Layers that transformers gives a cache of all tokens although the model does more than attend to all of them, and
    what it does. They are never compressed."""
    kinds = getattr(config.get_text_config(decoder=True), "attention_layers", None)
    return {i: f"{kind} attention" for i, kind in enumerate(kinds or ()) if kind != "global"}


def cross_attention_layers(config: Any) -> frozenset[int]:
    """Layers whose rows are those of an image and not of the tokens. They keep the cache that transformers makes."""
    return frozenset(getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ())


def _values(config: Any, field: str) -> Iterable[Any]:
    """The values of a field that every layer may have its own of."""
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, field, None) for layer in config.per_layer_config]
    return [getattr(config, field, None)]
