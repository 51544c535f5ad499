"""A tiny random Gemma 3 that reads characters, for the evaluation tests."""

from __future__ import annotations

import functools
import string
from types import SimpleNamespace
from typing import Any

import torch

ALPHABET = ["<unk>", "<bos>", *string.printable]


@functools.cache
def tokenizer() -> Any:
    """One token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = Fuse()
    characters.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", bos_token="<bos>")


@functools.cache
def model(attention: str = "sdpa", limit: int = 4096) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(ALPHABET),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        max_position_embeddings=limit,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return Gemma3ForCausalLM(config).eval()


def loaded(**options: Any) -> Any:
    """As `lagkv_ext.commands.models.load_model` returns it."""
    return SimpleNamespace(model=model(**options), tokenizer=tokenizer(), name="tiny", path="tiny")
