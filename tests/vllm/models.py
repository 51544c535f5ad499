"""Tiny random models, made on the spot with a tokenizer of numbers: token ``i`` is the word ``i``."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
# Large weights: greedy choices of a random model must not hang on the last bit.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **COMMON))


def gemma3() -> PreTrainedModel:
    """Four sliding-window layers and two of full attention."""
    torch.manual_seed(1)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        num_hidden_layers=6, layer_types=kinds, sliding_window=64, query_pre_attn_scalar=32, **COMMON
    )
    return Gemma3ForCausalLM(config)


MAKERS = {"llama": llama, "gemma3": gemma3}


def save(name: str, folder: Path) -> Path:
    """The model ``name`` as a folder that vLLM and transformers load."""
    path = folder / name
    model = MAKERS[name]().eval()
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", bos_token="1").save_pretrained(path)
    return path


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
