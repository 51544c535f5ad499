"""Helpers of the monitor tests: caches that are filled without a model, and values of a registry by name and labels."""

from __future__ import annotations

import dataclasses

import torch
from prometheus_client import CollectorRegistry

from lagkv_ext import LagKVCache
from lagkv_ext.serving.rollout import RolloutStatus, VariantStatus
from lagkv_ext.serving.rollout.status import REASONS
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
    """`total` of one scrape."""
    return total(values(registry), name, **labels)


def total(found: Values, name: str, **labels: str) -> float:
    """The sum of the series with these labels and any others: of all variants where none is named."""
    wanted = set(labels.items())
    chosen = [x for (n, of), x in found.items() if n == name and wanted <= set(of)]
    assert chosen, (name, labels)
    return sum(chosen)


@dataclasses.dataclass
class Rolled:
    """A rollout as the metrics see it: whatever has a ``status()`` of these fields."""

    found: RolloutStatus = dataclasses.field(
        default_factory=lambda: RolloutStatus(
            version=7,
            enabled=True,
            variants={
                "lagkv": VariantStatus(
                    share=0.25,
                    tripped=False,
                    decisions={**dict.fromkeys(REASONS, 1), "compressed": 5},
                    checks=3,
                    agreement=0.99,
                    agreement_at_least=0.9,
                    agreement_at_most=1.0,
                    kl=0.01,
                    rung=1,
                    samples=2,
                    reviews={"same": 1},
                )
            },
            check_errors=0,
            failures=0,
            unusable=False,
            reload_errors=0,
        )
    )

    def status(self) -> RolloutStatus:
        return self.found
