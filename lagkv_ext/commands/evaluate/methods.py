"""Rows that a cache keeps: LagKV and the methods it is compared with, all with the same number of rows.

A method is a function of one layer's cache that returns the positions of the rows to keep, ``index [1, H,
rows]`` int32, ascending, with ``rows = output_length(N, start, lag_size, keep)``: what LagKV keeps.
Methods that score tokens get the same protected rows as LagKV: the sink, and the last full partition with the
remainder. So a comparison of scores compares scores alone.

LagKV's own methods are named by their options: ``lagkv-SCORE`` with SCORE std, cosine or blend, then any of ``-k`` and
``-v`` (keys or values alone), ``-vX`` (``value_weight`` X), ``-wX`` (X times the paper's part of the blend),
``-smoothN``, and ``-head`` (a budget shared by all partitions of a head): ``lagkv-blend-smooth3-head``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lagkv_ext import formulas, keep_count, lag_score, output_length, reference, topk_index
from lagkv_ext.commands.evaluate.prefill import Attention
from lagkv_ext.commands.evaluate.types import EvaluationError, Setting

ENTRY_POINTS = "lagkv_ext.scores"


class NotPossible(Exception):
    """A method that cannot keep this number of rows; the message says why. The setting is left out, not
    approximated.
    """


@dataclass
class Layer:
    """The part of a layer that a method sees: keys and values ``[1, H, N, D]`` and the size that the cache has to
    come down to.

    ``start``: rows before it were left by earlier compressions, the first ``sink_size`` of them for ever.
    ``carried [1, H, start - sink_size]``: their scores, where the method carries scores; it puts the new ones there.
    """

    key: Tensor
    value: Tensor
    sink_size: int
    lag_size: int
    keep: int
    layer: int = 0
    seed: int = 0
    attention: Attention | None = None
    start: int = -1  # the sink's end unless given
    carried: Tensor | None = None

    def __post_init__(self) -> None:
        if self.start < 0:
            self.start = self.sink_size

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    @property
    def rows(self) -> int:
        return output_length(self.tokens, self.start, self.lag_size, self.keep)

    @property
    def partitions(self) -> int:
        """Partitions that this compression scores."""
        return formulas.compressed_count(self.tokens, self.start, self.lag_size)

    @property
    def candidates(self) -> slice:
        """Rows that may be dropped: those kept before, and the partitions that LagKV scores."""
        return slice(self.sink_size, self.start + self.partitions * self.lag_size)


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


@dataclass(frozen=True)
class LagKV:
    """LagKV with one choice of its options.

    ``use``: "both", "key" or "value" score. ``blend_weight``: of the paper's part in ``score="blend"``.
    """

    score: str = "std"
    use: str = "both"
    value_weight: float = 1.0
    blend_weight: float = 1.0
    smooth: int = 1
    budget: str = "partition"

    @classmethod
    def parse(cls, name: str) -> LagKV | None:
        """The method of this name; None where it is no name of LagKV's."""
        first, *rest = name.split("-")
        if first != "lagkv" or not rest or rest[0] not in SCORES:
            return None
        found: dict[str, Any] = {"score": rest[0]}
        for part in rest[1:]:
            match = re.fullmatch(r"(smooth)(\d+)|([vw])(\d+(?:\.\d+)?)|k|v|head", part)
            if match is None:
                return None
            if part in ("k", "v"):
                option: dict[str, Any] = {"use": "key" if part == "k" else "value"}
            elif part == "head":
                option = {"budget": "head"}
            elif match[1] == "smooth":
                option = {"smooth": int(match[2])}
            else:
                option = {{"v": "value_weight", "w": "blend_weight"}[match[3]]: float(match[4])}
            if found.keys() & option.keys():
                return None
            found |= option
        made = cls(**found)
        weighted = made.value_weight == 1 or made.use == "both"  # one side alone has no weight
        blended = made.blend_weight == 1 or made.score == "blend"
        return made if made.smooth % 2 and weighted and blended else None

    def scores(self, layer: Layer) -> Tensor:
        """``[1, H, P - 1, L]``: final scores of the partitions after ``layer.start``."""
        # Values in place of keys with weight 0 for themselves: their score alone.
        pair = (layer.value, layer.value) if self.use == "value" else (layer.key, layer.value)
        weight = self.value_weight if self.use == "both" else 0.0
        options: dict[str, Any] = {
            "sink_size": layer.start,
            "lag_size": layer.lag_size,
            "value_weight": weight,
        }
        if self.score == "blend":
            total = reference.lag_score(
                *pair, layer.start, layer.lag_size, value_weight=weight, score="blend"
            )
            if self.blend_weight != 1:
                paper = lag_score(*pair, score="std", **options)
                total = total + (self.blend_weight - 1) * layer.lag_size * paper
        else:
            total = lag_score(*pair, score=self.score, **options)
        return reference.smoothed(total, self.smooth)

    def __call__(self, layer: Layer) -> Tensor:
        scores = self.scores(layer)
        if self.budget == "head":
            old = scores.new_empty(*scores.shape[:2], 0) if layer.carried is None else layer.carried
            index, layer.carried = reference.head_index(scores, old, layer.start, layer.keep, layer.tokens)
            return index
        return each_partition(topk_index(scores, layer.keep), layer)

    @property
    def arguments(self) -> dict[str, Any] | None:
        """Arguments of ``LagKVCache`` other than defaults; None where its options cannot express the method."""
        if self.use == "value" or self.blend_weight != 1:
            return None
        found: dict[str, Any] = {"score": self.score}
        weight = 0.0 if self.use == "key" else self.value_weight
        for name, value, default in (
            ("value_weight", weight, 1.0),
            ("smooth", self.smooth, 1),
            ("budget", self.budget, "partition"),
        ):
            if value != default:
                found[name] = value
        return found

    @property
    def description(self) -> str:
        text = (
            "LagKV, "
            + {
                "std": "the paper's score: deviation of keys and values, normalised by the next partition",
                "cosine": "keys and values that point away from the next partition's mean",
                "blend": "the cosine score and the paper's together",
            }[self.score]
        )
        for differs, words in (
            (self.use != "both", f"{self.use}s only"),
            (self.value_weight != 1, f"values weigh {self.value_weight:g}"),
            (self.blend_weight != 1, f"the paper's part weighs {self.blend_weight:g}"),
            (self.smooth != 1, f"mean over {self.smooth} neighbours"),
            (self.budget == "head", "budget shared by all partitions of a head"),
        ):
            text += f"; {words}" if differs else ""
        return text


def each_partition(picked: Tensor, layer: Layer) -> Tensor:
    """The index of a compression from the rows ``picked [1, H, P - 1, keep]`` within each partition."""
    window = layer.start + layer.partitions * layer.lag_size
    begin = torch.arange(layer.start, window, layer.lag_size, dtype=torch.int32, device=picked.device)
    rows = torch.arange(layer.tokens, dtype=torch.int32, device=picked.device).expand(*picked.shape[:2], -1)
    kept = (picked + begin[:, None]).flatten(2)
    return torch.cat([rows[..., : layer.start], kept, rows[..., window:]], dim=-1)


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
    tiles = layer.key[:, :, layer.start : layer.candidates.stop].float()
    parts = tiles.unflatten(2, (-1, layer.lag_size))
    direction = F.normalize(parts, dim=-1)
    anchor = F.normalize(direction.mean(dim=3, keepdim=True), dim=-1)
    return -(direction * anchor).sum(dim=-1)


def keydiff_partition(layer: Layer) -> Tensor:
    """The same number of tokens of each partition, by `keydiff_local`."""
    return each_partition(topk_index(keydiff_local(layer), layer.keep), layer)


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
    "window": window,
    "random": by_score(random_score),
    "keynorm": by_score(key_norm),
    "keydiff": by_score(keydiff),
    "keydiff-partition": keydiff_partition,
    "h2o": by_score(h2o),
    "snapkv": by_score(snapkv),
}
NEED_ATTENTION = {"h2o", "snapkv"}
SCORES = ("std", "cosine", "blend")

DESCRIPTIONS = {
    "full": "nothing is dropped",
    "window": "sink and most recent tokens (StreamingLLM)",
    "random": "sink, recent tokens, and random others",
    "keynorm": "tokens with the smallest keys",
    "keydiff": "keys that differ most from the mean of all keys (KeyDiff)",
    "keydiff-partition": "KeyDiff within each partition",
    "h2o": "tokens with most attention from all tokens of the prompt (H2O)",
    "snapkv": "tokens with most attention from the prompt's last 32 tokens (SnapKV)",
}


def description(name: str) -> str:
    """One line for a reader of the results."""
    ours = LagKV.parse(name)
    return ours.description if ours else DESCRIPTIONS.get(name, "your own score")


def resolve(name: str) -> Method:
    """The method of this name: LagKV with its options, another one of `METHODS`, a user's entry point (group
    ``lagkv_ext.scores``), or ``module:function``.

    A user's function is given a `Layer` and returns a score ``[1, H, N]``; the highest are kept.

    Raises EvaluationError: there is none, or it cannot be imported.
    """
    if ours := LagKV.parse(name):
        return ours
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
            ours_too = (f"lagkv-{score}[-k|-v|-vX][-wX][-smoothN][-head]" for score in SCORES)
            known = ", ".join(["full", *ours_too, *METHODS, *points])
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


def layer_of(setting: Setting, key: Tensor, value: Tensor, *, prompt: str, seed: int, **more: Any) -> Layer:
    """The layer as the setting's method sees it; ``prompt`` makes random choices differ between prompts."""
    return Layer(
        key,
        value,
        sink_size=setting.sink_size,
        lag_size=setting.lag_size,
        keep=_keep(setting, key.shape[2]),
        seed=seed + zlib.crc32(prompt.encode()),
        **more,
    )


def _keep(setting: Setting, tokens: int) -> int:
    """Rows kept of a partition. Option ``as_L``: as many as fit into what LagKV with that lag size would
    keep in all.
    """
    size = dict(setting.options).get("as_L")
    if size is None:
        return keep_count(setting.keep_ratio, setting.lag_size)
    sink, lag = setting.sink_size, setting.lag_size
    budget = output_length(tokens, sink, size, keep_count(setting.keep_ratio, size))
    fitting = [k for k in range(1, lag + 1) if output_length(tokens, sink, lag, k) <= budget]
    if not fitting:
        least = output_length(tokens, sink, lag, 1)
        raise NotPossible(
            f"with lag_size {lag} at least {least} of {tokens} rows stay, more than the {budget} allowed"
        )
    return fitting[-1]


def too_short(setting: Setting, tokens: int) -> str | None:
    """The reason why nothing would be compressed; None where something is."""
    return _too_short(tokens, setting.sink_size, setting.lag_size) if setting.keep_ratio < 1 else None


def _too_short(tokens: int, sink_size: int, lag_size: int) -> str | None:
    least = sink_size + 2 * lag_size
    return f"{tokens} tokens are fewer than sink_size + 2 * lag_size = {least}" if tokens < least else None


def select(method: Method, layer: Layer) -> Tensor:
    """``method(layer)``, checked: the size asked for, ascending, in range.

    Raises NotPossible where the context is too short to be compressed.
    """
    if layer.keep < layer.lag_size and (reason := _too_short(layer.tokens, layer.sink_size, layer.lag_size)):
        raise NotPossible(reason)
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
