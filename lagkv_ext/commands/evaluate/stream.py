"""A context read piece by piece while its cache is compressed: chunked prefill, and decoding.

Several methods read it at once, as a batch. A step uses the cache, then compresses it, as `lagkv_ext.LagKVCache` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lagkv_ext import compact
from lagkv_ext.cache.fidelity import forward
from lagkv_ext.commands.evaluate.methods import Layer, Method, select

MakeLayer = Callable[[Tensor, Tensor], Layer]  # key, value [1, H, N, D] of one method's cache
DECODE = "decode"


class StreamLayer(DynamicLayer):
    """A full-attention layer whose batch holds one sequence for each method; all keep equally many rows."""

    keys: Tensor
    values: Tensor

    def __init__(self, methods: Sequence[tuple[Method, MakeLayer]]):
        super().__init__()
        self.methods, self.start = methods, -1
        self.carried: list[Tensor | None] = [None] * len(methods)

    def compress(self) -> None:
        """Bring every sequence down to its kept rows, where a partition and its reference are complete."""
        layers = []
        for b, (_, make) in enumerate(self.methods):
            layer = make(self.keys[b : b + 1], self.values[b : b + 1])
            layer.start = self.start if self.start >= 0 else layer.sink_size
            layer.carried = self.carried[b]
            layers.append(layer)
        if not layers[0].partitions:
            return
        index = torch.cat([select(m, x) for (m, _), x in zip(self.methods, layers, strict=True)])
        self.carried = [x.carried for x in layers]
        self.start = layers[0].start + layers[0].keep * layers[0].partitions
        self.keys, self.values = compact(self.keys, index), compact(self.values, index)


def pieces(tokens: int, chunk: int | str, sink_size: int, lag_size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of every forward pass over a context.

    ``chunk``: tokens of each, or "decode". In decoding a step of one token compresses exactly when it completes a
    partition. So tokens up to the next such place see the same cache, and are read in one pass.
    """
    if chunk == DECODE:
        first = min(tokens, sink_size + 2 * lag_size)
        edges = [0, *range(first, tokens, lag_size), tokens]
    else:
        edges = [*range(0, tokens, int(chunk)), tokens]
    return itertools.pairwise(sorted(set(edges)))


def read_in_pieces(
    model: Any,
    ids: Tensor,
    layers: Mapping[int, Sequence[tuple[Method, MakeLayer]]],
    cuts: Iterator[tuple[int, int]],
) -> DynamicCache:
    """The cache after ``ids [1, N]``, a sequence for each method; ``layers`` are the full-attention layers."""
    cache = DynamicCache(config=model.config)
    streams = {i: StreamLayer(methods) for i, methods in layers.items()}
    for i, layer in streams.items():
        cache.layers[i] = layer
    batch = len(next(iter(layers.values())))
    with torch.inference_mode():
        for begin, end in cuts:
            forward(model, ids[:, begin:end].expand(batch, -1), cache, position=begin, logits_to_keep=1)
            for layer in streams.values():
                layer.compress()
    for i, stream in streams.items():
        plain = DynamicLayer()
        plain.lazy_initialization(stream.keys, stream.values)
        plain.keys, plain.values = stream.keys, stream.values
        cache.layers[i] = plain
    return cache
