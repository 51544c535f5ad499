"""Measures how far a model with another cache departs from itself with the full one, token by token.

The evaluation on samples and the rollout's checks on real traffic share this definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lagkv_ext.cache.keyword import cache_argument


def forward(model: Any, ids: Tensor, cache: Any, *, position: int, logits_to_keep: Any) -> Tensor:
    """Logits ``[B, kept, vocabulary]`` of new tokens ``ids [B, n]`` at ``position``: their place in the text,
    whatever the cache still holds.
    """
    positions = torch.arange(position, position + ids.shape[1], device=ids.device).expand(ids.shape)
    return model(
        input_ids=ids,
        position_ids=positions,
        **cache_argument(cache, model),
        use_cache=True,
        logits_to_keep=logits_to_keep,
    ).logits


def departure(full: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Compares log probabilities ``[n, vocabulary]`` of the full and of another cache: bool ``[n]``, whether both have
    the same most likely token, and ``[n]``, KL(full || other) in nats.
    """
    agree = full.argmax(dim=-1) == other.argmax(dim=-1)
    terms = full.exp() * (full - other)
    # Tokens that the full cache rules out add nothing, also where the other one rules it out too: 0 * (inf - inf).
    terms = terms.masked_fill(full == float("-inf"), 0.0)
    return agree, terms.sum(dim=-1).clamp_min(0.0)  # rounding alone goes below
