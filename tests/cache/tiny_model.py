"""A tiny Gemma 3 whose answers are known: it always says which word follows the last one, by a table."""

from __future__ import annotations

from pathlib import Path

import torch

# "is" is followed by "red", "red" by "moon", "moon" by "is", and any other word by "the".
WORDS = [
    "<unk>",
    "<bos>",
    "the",
    "code",
    "of",
    "gate",
    "door",
    "is",
    "red",
    "moon",
    "blue",
    "car",
    ".",
    "walk",
    "on",
]
FOLLOWS = {"is": "red", "red": "moon", "moon": "is"}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def tokenizer():
    """One token per word, ``<bos>`` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<bos>")


def model(layer_types: list[str] | None = None):
    """Random attention and feed-forward weights that fill the cache, but whose results are not added to the stream."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layer_types = LAYERS if layer_types is None else layer_types
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        layer_types=layer_types,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    out = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        out.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), 16))
        out.lm_head.weight.zero_()
        for index, word in enumerate(WORDS):
            out.lm_head.weight[WORDS.index(FOLLOWS.get(word, "the")), index] = 1.0
        for layer in out.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return out


def save(directory: Path, layer_types: list[str] | None = None) -> Path:
    """A directory as ``--model`` takes it."""
    model(layer_types).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
