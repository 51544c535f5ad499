"""Families of the installed transformers, configurations that matter, and what no rule can guess."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of a family, and how its models are called."""

    family: str
    variant: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: arguments of the first step beyond tokens, made for a batch
    first_step: Mapping[str, Callable[[int], Tensor]] = dataclasses.field(default_factory=dict)
    #: the same for every step
    every_step: Mapping[str, Callable[[int], Tensor]] = dataclasses.field(default_factory=dict)
    #: rows that the cache has in front of those of the tokens
    rows_before: int = 0
    #: forward wants all tokens in every step
    all_tokens: bool = False
    encoder_decoder: bool = False

    @property
    def name(self) -> str:
        return f"{self.family} ({self.variant})" if self.variant else self.family


_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
_CONV_AND_FULL = ["conv", "full_attention"] * 2
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_OF_KINDS = {"sliding_attention": _DEFAULT_ROPE, "full_attention": None}
_FOUR_LAYERS = {"num_hidden_layers": 4}
_EVERY_OTHER = {**_FOUR_LAYERS, "attn_layer_period": 2, "attn_layer_offset": 1}
_GROUPED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_NO_WINDOW = {"sliding_window": None}
_WINDOW = {"sliding_window": 6}
_SOME_WINDOWS = {
    **_FOUR_LAYERS,
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": _SLIDING_AND_FULL,
}
_SHARED_LAYERS = {
    "global_head_dim": 8,
    **_FOUR_LAYERS,
    "num_kv_shared_layers": 2,
    "layer_types": _SLIDING_AND_FULL,
}
_SECTIONS = {"rope_parameters": {**_DEFAULT_ROPE, "mrope_section": [2, 1, 1]}}
_CROSS_ATTENTION = {**_FOUR_LAYERS, "cross_attention_layers": [1, 3]}


_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
            "indexer_compress_ratio": 4}  # fmt: skip
_COMPASS = {**_FOUR_LAYERS, "layer_types": _SLIDING_AND_FULL, "rope_parameters": _ROPE_OF_KINDS}


def _states(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(3))


#: Changes that the rules of `tiny` do not find: values that must fit together, settings with a kind of layer.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**_FOUR_LAYERS, "attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {**_GROUPED_EXPERTS, "first_k_dense_replace": 1},
    "doge": {"keep_window_size": 512},
    "dory": {**_FOUR_LAYERS, "layer_types": _SLIDING_AND_FULL, "n_input_layers": 1, "n_recurrent_layers": 2,
             "n_output_layers": 1},
    "dots1": {**_GROUPED_EXPERTS, "n_shared_experts": 1, "layer_types": ["full_attention"] * 2},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": _SLIDING_AND_FULL[:2] * 3,
                     "activation_sparsity_pattern": [0.5] + [0.0] * 5, "laurel_rank": 8, "intermediate_size": 32},
    "gemma4": {"text_config": {"global_head_dim": 8}},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified": {"text_config": {"global_head_dim": 8}},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_FOUR_LAYERS, "mamba_d_head": 16, "shared_intermediate_size": 32,
                         "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "jamba": _EVERY_OTHER,
    "lfm2": {**_FOUR_LAYERS, "layer_types": _CONV_AND_FULL},
    "lfm2_moe": {**_FOUR_LAYERS, "layer_types": _CONV_AND_FULL},
    "longcat_flash": {"qk_head_dim": 16, "qk_nope_head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {**_FOUR_LAYERS, "head_dim": 8, "layer_types": _SLIDING_AND_FULL},
    "mllama": {"text_config": _CROSS_ATTENTION},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    **{
        family: {"text_config": _SECTIONS}
        for family in (
            "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl",
        )
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "lsh"], "axial_pos_shape": (16, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_EVERY_OTHER, "attention_hidden_size": 64, "attention_head_dim": 16},
}  # fmt: skip

_CALLS: dict[str, dict[str, Any]] = {
    **{
        f"{family} (with an encoder)": {"every_step": {"encoder_hidden_states": _states(7, 32)}}
        for family in ("bart", "bert", "gpt2", "trocr")
    },
    "cpmant": {"all_tokens": True, "rows_before": 4},
    "git": {"first_step": {"pixel_values": _states(3, 32, 32)}, "rows_before": 5},
    "mllama": {"first_step": {"cross_attention_states": _states(7, 32)}},
}

#: Configurations besides the default in which a family attends in another way.
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bart": {"with an encoder": {}},
    "bert": {"is_decoder=False": {"is_decoder": False}, "with an encoder": {"add_cross_attention": True}},
    "trocr": {"with an encoder": {}},
    "cohere2": {"all full": {"layer_types": ["full_attention"] * 4}},
    "doge": {"one head": {"keep_window_size": 512, "num_key_value_heads": 1}},
    "dory": {"last_loop": {**_CHANGES["dory"], "recurrent_kv_cache_mode": "last_loop"}},
    "falcon": {"alibi": {"alibi": True}, "new_decoder_architecture": {"new_decoder_architecture": True}},
    "gemma4_text": {"shared layers": _SHARED_LAYERS},
    "gemma4_unified_text": {"shared layers": _SHARED_LAYERS},
    "gpt2": {"with an encoder": {"add_cross_attention": True}},
    "gpt_bigcode": {"multi_query=False": {"multi_query": False}},
    "llama4_text": {"no chunks": {"attention_chunk_size": None, "layer_types": ["full_attention"] * 4}},
    "minimax_m3_vl_text": {
        "sparse layers": {
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        }
    },
    "ministral3": {"window": _WINDOW},
    "idefics2": {"no window": {"text_config": _NO_WINDOW}},
    "mistral": {"no window": _NO_WINDOW},
    "mistral3": {"no window": {"text_config": _NO_WINDOW}},
    "mixtral": {"window": _WINDOW},
    "mpt": {"alibi=False": {"attn_config": {"alibi": False}}},  # it makes a bias all the same
    "phi3": {"window": _WINDOW},
    "qwen2": {"some windows": _SOME_WINDOWS},
    "qwen3": {"some windows": _SOME_WINDOWS},
    "qwen3_moe": {"window": {"use_sliding_window": True, **_WINDOW}},
    "starcoder2": {"window": _WINDOW},
}


ENCODER_DECODER = "encoder-decoder"
#: Mappings in which families are found, with the classes that make models. Each is taken from the first that has it.
_DECODERS = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
_ENCODER_DECODERS = {
    AutoModelForSeq2SeqLM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForSpeechSeq2Seq: modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


def families() -> list[str]:
    """Every family of the installed transformers that writes text: causal language models, models that also look or
    listen (tried with text), and encoder-decoders."""
    found = {family for mapping in (_DECODERS | _ENCODER_DECODERS).values() for family in mapping}
    return sorted(family for family in found if cases(family))


def auto_class(case: Case) -> Any:
    first, second = (_ENCODER_DECODERS, _DECODERS) if case.encoder_decoder else (_DECODERS, _ENCODER_DECODERS)
    return next(made_by for made_by, mapping in (first | second).items() if case.family in mapping)


def config_class(family: str) -> Any:
    return CONFIG_MAPPING[family]


def cases(family: str) -> list[Case]:
    changes, calls = _CHANGES.get(family, {}), _CALLS.get(family, {})
    two_parts = config_class(family).is_encoder_decoder
    found = []
    if family in _DECODERS[AutoModelForCausalLM] or not two_parts:
        found.append(Case(family, changes=changes, **calls))
    for variant, variant_changes in _VARIANTS.get(family, {}).items():
        found.append(Case(family, variant, variant_changes, **_CALLS.get(f"{family} ({variant})", calls)))
    if two_parts and any(family in mapping for mapping in _ENCODER_DECODERS.values()):
        found.append(Case(family, ENCODER_DECODER, changes, encoder_decoder=True))
    return found
