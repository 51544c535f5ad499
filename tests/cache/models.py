"""Tiny random models for the cache tests, and an attention of record to compare a compressed cache with.

`Oracle` never compresses anything: the model runs on transformers' own cache, and its full-attention layers
attend, by hand, to exactly the positions that docs/method.md 3 leaves (scored by ``lagkv_ext.reference``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lagkv_ext import reference
from lagkv_ext.cache.keyword import cache_argument

VOCABULARY = 64
KINDS = ("llama", "qwen3", "gemma3")
SMALL = {"lag_size": 8, "sink_size": 4}  # compresses every 8 tokens
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def since(*version: int, reason: str) -> pytest.MarkDecorator:
    """Skip with an older transformers, which cannot do it with any cache."""
    text = ".".join(map(str, version))
    return pytest.mark.skipif(version > VERSION, reason=f"transformers before {text}: {reason}")


several_tokens_compiled = since(
    5, 20, reason="masks of several tokens branch on the offset, which is a tensor"
)

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # large enough that attention is far from uniform and every wrong row shows
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def tiny_config(kind: str, attention: str = "sdpa") -> Any:
    if kind == "llama":
        config = LlamaConfig(**_SHARED, num_hidden_layers=3, num_key_value_heads=2)
    elif kind == "qwen3":
        config = Qwen3Config(**_SHARED, num_hidden_layers=3, num_key_value_heads=4)
    else:
        layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        config = Gemma3TextConfig(
            **_SHARED, num_hidden_layers=4, num_key_value_heads=2, sliding_window=12, layer_types=layers
        )
    config._attn_implementation = attention
    return config


@functools.cache
def tiny_model(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """The same weights for every attention implementation and dtype."""
    classes = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "gemma3": Gemma3ForCausalLM}
    torch.manual_seed(KINDS.index(kind))
    model = classes[kind](tiny_config(kind, attention))
    if kind == "gemma3":
        # Its embeddings are multiplied by sqrt(hidden_size): without this, attention hardly matters.
        model.model.embed_tokens.weight.data /= 8
    return model.to(dtype).eval()


def prompt(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random tokens without the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, cache: Any, new: int = 30, **options: Any) -> Tensor:
    return model.generate(ids, **cache_argument(cache), max_new_tokens=new, do_sample=False, **options)


@torch.no_grad()
def forward(model: Any, cache: Any, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits of all tokens, given to the model in chunks."""
    parts = ids.split(chunks, dim=1)
    return torch.cat([model(input_ids=part, **cache_argument(cache)).logits for part in parts], dim=1)


class OracleLayer:
    """Positions that one layer would still hold, and attention over them."""

    def __init__(
        self,
        lag_size: int,
        keep: int,
        sink_size: int,
        max_tokens: int | None = None,
        **scoring: Any,
    ):
        self.lag_size, self.keep, self.scoring = lag_size, keep, scoring
        self.start = self.sink_size = sink_size
        self.max_tokens = max_tokens
        self.positions: Tensor | None = None  # [B, H, rows]
        self.compressions = 0
        self.gap = float("inf")  # the least difference of two scores between which a cut was made

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """``key, value [B, H, N, D]`` of all tokens ever seen; the queries are the last ``n`` of them."""
        batch, heads, total, _ = key.shape
        new = query.shape[2]
        old = total - new
        if self.positions is None:
            self.positions = key.new_zeros((batch, heads, 0), dtype=torch.long)
        arrived = torch.arange(old, total).expand(batch, heads, new)
        self.positions = torch.cat([self.positions, arrived], dim=2)
        visible = self.positions
        while self._compress(key, value) and self.positions.shape[2] >= (self.max_tokens or float("inf")):
            pass

        mask = torch.zeros(batch, heads, 1, total, dtype=torch.bool).scatter(3, visible.unsqueeze(2), True)
        mask = mask & (torch.arange(total) <= torch.arange(old, total)[:, None])
        groups = query.shape[1] // heads
        key, value, mask = (x.repeat_interleave(groups, dim=1) for x in (key, value, mask))
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return weights @ value

    def _compress(self, key: Tensor, value: Tensor) -> bool:
        count = max((self.positions.shape[2] - self.start) // self.lag_size - 1, 0)
        self.positions = self._kept(key, value, self.positions)
        self.compressions += count > 0
        self.start += count * self.keep
        if self.max_tokens is not None and self.start + 2 * self.lag_size > self.max_tokens:
            self.start = self.sink_size
        return count > 0

    def _kept(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        rows = [x.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])) for x in (key, value)]
        index = reference.compress(*rows, self.start, self.lag_size, self.keep, **self.scoring)[2]
        scores = (
            reference.lag_score(*rows, self.start, self.lag_size, **self.scoring).sort(descending=True).values
        )
        if scores.numel() and self.keep < self.lag_size:
            self.gap = min(self.gap, float((scores[..., self.keep - 1] - scores[..., self.keep]).min()))
        return positions.gather(2, index.long())


class Oracle:
    """Runs a model as if its full-attention layers were compressed."""

    def __init__(self, kind: str, layers: dict[int, OracleLayer], dtype: torch.dtype = torch.float64):
        self.model = tiny_model(kind, "sdpa", dtype)
        self.layers = layers
        self.cache = DynamicCache(config=self.model.config)

    def forward(self, ids: Tensor, chunks: list[int]) -> Tensor:
        with _attention(self.layers):
            self.model.set_attn_implementation("lagkv_oracle")
            try:
                return forward(self.model, self.cache, ids, chunks)
            finally:
                self.model.set_attn_implementation("sdpa")


_current: dict[int, OracleLayer] = {}


def _oracle_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    layer = _current.get(module.layer_idx)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return layer.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _attention(layers: dict[int, OracleLayer]) -> Iterator[None]:
    _current.update(layers)
    try:
        yield
    finally:
        _current.clear()


AttentionInterface.register("lagkv_oracle", _oracle_attention)
AttentionMaskInterface.register("lagkv_oracle", sdpa_mask)


def full_layers(kind: str) -> list[int]:
    return [1, 3] if kind == "gemma3" else [0, 1, 2]
