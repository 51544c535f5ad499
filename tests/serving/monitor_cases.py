"""What the monitor tests share: caches that are filled without a model, and values of a registry by name and labels."""

from __future__ import annotations

import dataclasses

import torch
from prometheus_client import CollectorRegistry

from lagkv_ext import LagKVCache
from lagkv_ext.serving.rollout import RolloutStatus
from tests.cache.models import SMALL, tiny_config

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def cache(kind: str = "llama", **settings) -> LagKVCache:
    return LagKVCache(tiny_config(kind), **{**SMALL, **settings})


def fill(held, tokens: int, batch: int = 1) -> None:
    """Random states for every layer, as a step of a model gives them."""
    heads = 2
    if hasattr(held, "set_attention_mask"):
        held.set_attention_mask(None)
    for i in range(len(held.layers)):
        held.update(torch.randn(batch, heads, tokens, 16), torch.randn(batch, heads, tokens, 16), i)


def values(registry: CollectorRegistry) -> Values:
    """Every sample of one scrape, but those that say when a series was made."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return values(registry)[name, tuple(sorted(labels.items()))]


@dataclasses.dataclass
class Rolled:
    """A rollout as the metrics see it: whatever has a ``status()`` of these fields."""

    found: RolloutStatus = dataclasses.field(
        default_factory=lambda: RolloutStatus(
            version=7,
            enabled=True,
            share=0.25,
            tripped=False,
            decisions={
                "compressed": 5,
                **dict.fromkeys(("disabled", "share", "short_prompt", "tripped", "error"), 1),
            },
            checks=3,
            agreement=0.99,
            kl=0.01,
            check_errors=0,
            failures=0,
            unusable=False,
            reload_errors=0,
        )
    )

    def status(self) -> RolloutStatus:
        return self.found
