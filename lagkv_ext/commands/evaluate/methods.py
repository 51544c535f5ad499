"""Which rows a cache keeps: LagKV and the methods it is compared with, all with the same number of rows.

A method is a function of one layer's cache that returns the positions of the rows to keep, ``index [1, H,
rows]`` int32, ascending, with ``rows = output_length(N, sink_size, lag_size, keep)``: what LagKV keeps.
Methods that score tokens get the same protected rows as LagKV: the sink, and the last full partition with the
remainder. So a comparison of scores compares scores alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lagkv_ext import compress, formulas, keep_count, lag_score, output_length, topk_index
from lagkv_ext.commands.evaluate.prefill import Attention
from lagkv_ext.commands.evaluate.types import EvaluationError, Setting

ENTRY_POINTS = "lagkv_ext.scores"


class NotPossible(Exception):
    """A method that cannot keep this number of rows; the message says why. The setting is left out, not
    approximated.
    """


@dataclass
class Layer:
    """What a method sees of one layer: keys and values ``[1, H, N, D]`` and the size that the cache has to
    come down to.
    """

    key: Tensor
    value: Tensor
    sink_size: int
    lag_size: int
    keep: int
    layer: int = 0
    seed: int = 0
    attention: Attention | None = None

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    @property
    def rows(self) -> int:
        return output_length(self.tokens, self.sink_size, self.lag_size, self.keep)

    @property
    def candidates(self) -> slice:
        """Tokens that may be dropped: the partitions that LagKV scores."""
        count = formulas.compressed_count(self.tokens, self.sink_size, self.lag_size)
        return slice(self.sink_size, self.sink_size + count * self.lag_size)


Method = Callable[[Layer], Tensor]
Score = Callable[[Layer], Tensor]  # [1, H, N], higher is kept


def by_score(score: Score) -> Method:
    """Keep the highest scores of all candidates together, per head, besides the protected rows."""

    def method(layer: Layer) -> Tensor:
        free = layer.candidates
        budget = layer.rows - (layer.tokens - (free.stop - free.start))
        picked = topk_index(score(layer)[..., free].contiguous(), budget) + free.start
        head = torch.arange(layer.tokens, dtype=torch.int32, device=picked.device).expand(
            *picked.shape[:2], -1
        )
        return torch.cat([head[..., : free.start], picked, head[..., free.stop :]], dim=-1)

    return method


def lagkv(score: str = "std", *, use: str = "both") -> Method:
    """LagKV itself; ``use``: "both", "key" or "value" score."""

    def method(layer: Layer) -> Tensor:
        # Values in place of keys with weight 0 for themselves: their score alone.
        key, value = (layer.value, layer.value) if use == "value" else (layer.key, layer.value)
        weight = 1.0 if use == "both" else 0.0
        return compress(
            key,
            value,
            lag_size=layer.lag_size,
            keep=layer.keep,
            sink_size=layer.sink_size,
            value_weight=weight,
            score=score,
        ).index

    return method


def lagkv_global(score: str) -> Method:
    """LagKV's scores, but the budget is shared by all partitions of a head instead of the same for each."""

    def scores(layer: Layer) -> Tensor:
        parts = lag_score(
            layer.key, layer.value, lag_size=layer.lag_size, sink_size=layer.sink_size, score=score
        )
        out = torch.zeros(layer.key.shape[:3], dtype=parts.dtype, device=parts.device)
        out[..., layer.candidates] = parts.flatten(2)
        return out

    return by_score(scores)


def window(layer: Layer) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the sink and the most recent tokens."""
    position = torch.arange(layer.tokens, dtype=torch.int32, device=layer.key.device)
    recent = layer.tokens - (layer.rows - layer.sink_size)
    index = torch.cat([position[: layer.sink_size], position[recent:]])
    return index.expand(*layer.key.shape[:2], -1).contiguous()


def random_score(layer: Layer) -> Tensor:
    generator = torch.Generator().manual_seed(layer.seed * 1_000_003 + layer.layer)
    return torch.rand(layer.key.shape[:3], generator=generator).to(layer.key.device)


def key_norm(layer: Layer) -> Tensor:
    """Small keys draw much attention (arXiv 2406.11430): keep the smallest."""
    return -layer.key.float().norm(dim=-1)


def keydiff(layer: Layer) -> Tensor:
    """KeyDiff (arXiv 2504.15364): minus the cosine between a key and the mean direction of all keys."""
    direction = F.normalize(layer.key.float(), dim=-1)
    anchor = F.normalize(direction.mean(dim=2, keepdim=True), dim=-1)
    return -(direction * anchor).sum(dim=-1)


def keydiff_local(layer: Layer) -> Tensor:
    """KeyDiff within each partition: the anchor is the partition's own mean direction."""
    parts = layer.key[:, :, layer.candidates].float().unflatten(2, (-1, layer.lag_size))
    direction = F.normalize(parts, dim=-1)
    anchor = F.normalize(direction.mean(dim=3, keepdim=True), dim=-1)
    return -(direction * anchor).sum(dim=-1)


def keydiff_partition(layer: Layer) -> Tensor:
    """The same number of tokens of each partition, by `keydiff_local`."""
    picked = topk_index(keydiff_local(layer), layer.keep)  # [1, H, P - 1, keep]
    free = layer.candidates
    begin = (
        torch.arange(picked.shape[2], dtype=torch.int32, device=picked.device) * layer.lag_size + free.start
    )
    head = torch.arange(layer.tokens, dtype=torch.int32, device=picked.device).expand(*picked.shape[:2], -1)
    return torch.cat(
        [head[..., : free.start], (picked + begin[:, None]).flatten(2), head[..., free.stop :]], dim=-1
    )


def h2o(layer: Layer) -> Tensor:
    """H2O (arXiv 2306.14048): attention summed over all queries; here over the prompt, whose end does not
    know the question.
    """
    return _attention_of(layer, "h2o").accumulated


def snapkv(layer: Layer) -> Tensor:
    """SnapKV (arXiv 2404.14469): attention of the last 32 queries, averaged over 7 neighbours; again
    without the question.
    """
    observed = _attention_of(layer, "snapkv").observed
    return F.avg_pool1d(observed, kernel_size=7, stride=1, padding=3)


def _attention_of(layer: Layer, name: str) -> Attention:
    if layer.attention is None:
        raise EvaluationError(f"the method {name} needs attention weights, which were not recorded")
    return layer.attention


METHODS: dict[str, Method] = {
    "lagkv-std": lagkv("std"),
    "lagkv-cosine": lagkv("cosine"),
    "lagkv-std-k": lagkv("std", use="key"),
    "lagkv-std-v": lagkv("std", use="value"),
    "lagkv-cosine-k": lagkv("cosine", use="key"),
    "lagkv-cosine-v": lagkv("cosine", use="value"),
    "lagkv-std-global": lagkv_global("std"),
    "lagkv-cosine-global": lagkv_global("cosine"),
    "window": window,
    "random": by_score(random_score),
    "keynorm": by_score(key_norm),
    "keydiff": by_score(keydiff),
    "keydiff-partition": keydiff_partition,
    "h2o": by_score(h2o),
    "snapkv": by_score(snapkv),
}
NEED_ATTENTION = {"h2o", "snapkv"}

DESCRIPTIONS = {
    "full": "nothing is dropped",
    "lagkv-std": "LagKV as in the paper: deviation of keys and values, normalised by the next partition",
    "lagkv-cosine": "LagKV with the cosine score: keys and values that point away from the next partition's mean",
    "lagkv-std-k": "LagKV, keys only",
    "lagkv-std-v": "LagKV, values only",
    "lagkv-cosine-k": "LagKV with the cosine score, keys only",
    "lagkv-cosine-v": "LagKV with the cosine score, values only",
    "lagkv-std-global": "LagKV's score, budget shared by all partitions of a head",
    "lagkv-cosine-global": "LagKV's cosine score, budget shared by all partitions of a head",
    "window": "sink and most recent tokens (StreamingLLM)",
    "random": "sink, recent tokens, and random others",
    "keynorm": "tokens with the smallest keys",
    "keydiff": "keys that differ most from the mean of all keys (KeyDiff)",
    "keydiff-partition": "KeyDiff within each partition",
    "h2o": "tokens with most attention from all tokens of the prompt (H2O)",
    "snapkv": "tokens with most attention from the prompt's last 32 tokens (SnapKV)",
}


def resolve(name: str) -> Method:
    """The method of this name: built in, a user's entry point (group ``lagkv_ext.scores``), or ``module:function``.

    A user's function is given a `Layer` and returns a score ``[1, H, N]``; the highest are kept.

    Raises EvaluationError: there is none, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    points = {p.name: p for p in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    try:
        if name in points:
            function: Any = points[name].load()
        elif ":" in name:
            module, _, attribute = name.partition(":")
            function = getattr(importlib.import_module(module), attribute)
        else:
            known = ", ".join(["full", *METHODS, *points])
            raise EvaluationError(
                f"there is no method {name!r}; there are {known}, or module:function of your own"
            )
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"the method {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise EvaluationError(f"the method {name!r} must be a function, got {type(function).__name__}")
    return by_score(_checked(function, name))


def _checked(function: Score, name: str) -> Score:
    def score(layer: Layer) -> Tensor:
        result = function(layer)
        wanted = tuple(layer.key.shape[:3])
        if not isinstance(result, Tensor) or tuple(result.shape) != wanted or not result.is_floating_point():
            got = (
                f"{result.dtype} {list(result.shape)}"
                if isinstance(result, Tensor)
                else type(result).__name__
            )
            raise EvaluationError(
                f"{name} must return a floating-point score [1, H, N] = {list(wanted)}, got {got}"
            )
        return result

    return score


def layer_of(
    setting: Setting,
    key: Tensor,
    value: Tensor,
    *,
    layer: int,
    prompt: str,
    seed: int,
    attention: Attention | None,
) -> Layer:
    """The layer as the setting's method sees it; ``prompt`` makes random choices differ between prompts."""
    return Layer(
        key,
        value,
        sink_size=setting.sink_size,
        lag_size=setting.lag_size,
        keep=_keep(setting, key.shape[2]),
        layer=layer,
        seed=seed + zlib.crc32(prompt.encode()),
        attention=attention,
    )


def _keep(setting: Setting, tokens: int) -> int:
    """Rows kept of a partition. Option ``as_L``: as many as fit into what LagKV with that lag size would
    keep in all.
    """
    reference = dict(setting.options).get("as_L")
    if reference is None:
        return keep_count(setting.keep_ratio, setting.lag_size)
    sink, lag = setting.sink_size, setting.lag_size
    budget = output_length(tokens, sink, reference, keep_count(setting.keep_ratio, reference))
    fitting = [k for k in range(1, lag + 1) if output_length(tokens, sink, lag, k) <= budget]
    if not fitting:
        least = output_length(tokens, sink, lag, 1)
        raise NotPossible(
            f"with lag_size {lag} at least {least} of {tokens} rows stay, more than the {budget} allowed"
        )
    return fitting[-1]


def select(method: Method, layer: Layer) -> Tensor:
    """``method(layer)``, checked: the size asked for, ascending, in range.

    Raises NotPossible where the context is too short to be compressed.
    """
    if layer.rows == layer.tokens and layer.keep < layer.lag_size:
        raise NotPossible(
            f"{layer.tokens} tokens are fewer than sink_size + 2 * lag_size = {layer.sink_size + 2 * layer.lag_size}"
        )
    if layer.keep == layer.lag_size:
        position = torch.arange(layer.tokens, dtype=torch.int32, device=layer.key.device)
        return position.expand(*layer.key.shape[:2], -1).contiguous()
    index = method(layer)
    wanted = (*layer.key.shape[:2], layer.rows)
    if index.shape != wanted or index.dtype != torch.int32:
        raise RuntimeError(f"a method must return int32 {wanted}, got {index.dtype} {tuple(index.shape)}")
    if not bool((index[..., 1:] > index[..., :-1]).all()) or int(index[..., -1].max()) >= layer.tokens:
        raise RuntimeError("a method must return ascending positions within the context")
    return index
