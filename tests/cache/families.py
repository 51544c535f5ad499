"""Tiny random models of many families, made from their configurations: decoders, and encoder-decoders."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

from tests.cache.models import VOCABULARY

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough that attention is far from uniform and every wrong row shows
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"]

#: model class, configuration beyond `_SHARED`, full-attention layers (None: every layer slides)
DECODERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "Llama": ("LlamaForCausalLM", {}, [0, 1]),
    "Mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 8}, [0, 1]),
    "Ministral": (
        "MinistralForCausalLM",
        {"sliding_window": 12, "layer_types": _ALTERNATING, "head_dim": 8},
        [1],
    ),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}, [0, 1]),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {"sliding_window": 12, "layer_types": _ALTERNATING, "head_dim": 8},
        [1],
    ),
    # Two layers that keep keys and values, then one of each kind that reads those of the layers before.
    "Gemma 4": (
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 12,
            "layer_types": _ALTERNATING * 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        [1],
    ),
    "Phi": ("PhiForCausalLM", {}, [0, 1]),
    "Phi 3": ("Phi3ForCausalLM", {"sliding_window": None}, [0, 1]),
    # Learned attention sinks take part in every softmax.
    "GPT-OSS": (
        "GptOssForCausalLM",
        {
            "sliding_window": 12,
            "layer_types": _ALTERNATING,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        [1],
    ),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
        },
        [1],
    ),
    "LFM2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, [1]),
    # Every layer has both: attention and a state space model.
    "Falcon-H1": (
        "FalconH1ForCausalLM",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "initializer_range": 0.2,
        },
        [0, 1],
    ),
}

_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 512,
    "init_std": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
ENCODER_DECODERS = {
    "BART": "BartForConditionalGeneration",
    "Marian": "MarianMTModel",
    "Pegasus": "PegasusForConditionalGeneration",
    "mBART": "MBartForConditionalGeneration",
}


@functools.cache
def decoder(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights for every dtype."""
    name, changes, _ = DECODERS[family]
    return _model(name, {**_SHARED, **changes}, dtype)


@functools.cache
def encoder_decoder(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return _model(ENCODER_DECODERS[family], _ENCODER_DECODER, dtype)


def _model(name: str, config: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config))
    if name.startswith("Gemma"):
        # Their embeddings are multiplied by sqrt(hidden_size): without this, attention hardly matters.
        model.model.embed_tokens.weight.data /= 6
    if dtype == torch.float64 and hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the default has no kernel for float64
    return model.to(dtype).eval()
