"""`LagKVCache` with the engine's rule: compress where the tokens seen are a multiple of the boundary, nowhere else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lagkv_ext import LagKVCache
from lagkv_ext.cache.keyword import cache_argument


@functools.lru_cache(maxsize=2)
def _model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def cache_tokens(path: Path, prompt: list[int], new: int, *, boundary: int, **settings: Any) -> list[int]:
    """Greedy tokens of transformers with the cache; the prompt is read in pieces of ``boundary`` tokens."""
    model = _model(path)
    cache = cache_argument(LagKVCache(model.config, boundary=boundary, **settings), model)
    tokens = torch.tensor([prompt])
    generated: list[int] = []
    with torch.inference_mode():
        for begin in range(0, len(prompt), boundary):
            logits = model(tokens[:, begin : begin + boundary], **cache).logits
        while True:
            generated.append(int(logits[0, -1].argmax()))
            if len(generated) == new:
                return generated
            logits = model(torch.tensor([generated[-1:]]), **cache).logits
