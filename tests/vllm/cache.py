"""`LagKVCache` with the engine's rule: compress where the tokens seen are a multiple of the boundary, nowhere else."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lagkv_ext import LagKVCache


@functools.lru_cache(maxsize=2)
def _model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def cache_tokens(path: Path, prompt: list[int], new: int, *, boundary: int, **settings: Any) -> list[int]:
    """Greedy tokens of transformers with the cache; the prompt is read in pieces of ``boundary`` tokens."""
    model = _model(path)
    cache = LagKVCache(model.config, **settings)
    for layer in cache.layers:
        if hasattr(layer, "_track"):
            _only_at(layer, boundary)
    tokens = torch.tensor([prompt])
    generated: list[int] = []
    with torch.inference_mode():
        for begin in range(0, len(prompt), boundary):
            logits = model(tokens[:, begin : begin + boundary], past_key_values=cache).logits
        while True:
            generated.append(int(logits[0, -1].argmax()))
            if len(generated) == new:
                return generated
            logits = model(torch.tensor([generated[-1:]]), past_key_values=cache).logits


def _only_at(layer: Any, boundary: int) -> None:
    track = layer._track
    plan = track.plan

    def at_boundary(new: int = 0, *args: Any, **kwargs: Any) -> Any:
        planned = plan(new, *args, **kwargs)
        if (track.seen + new) % boundary:
            return dataclasses.replace(planned, passes=(), rows=track.rows + new, start=track.start)
        return planned

    track.plan = at_boundary
