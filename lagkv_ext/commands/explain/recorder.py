"""Watches a cache compress: the scores, ranks and positions behind every choice.

A cache does not keep scores. So every call of an operator that compresses is seen as torch dispatches it
(`torch.overrides.TorchFunctionMode`, a public hook), and the same rows are scored with the same options first. What is
derived from these calls is held against what the operators and the cache say: an operator or an option that is not
known here is an error, not a wrong picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lagkv_ext import LagKVCache
from lagkv_ext.commands.explain.explanation import Layer

_COMPRESS = ("compress", "compress_", "compress_carried")
_CHOOSING = {"keep", "budget", "carried", "scores", "sink_size"}  # options that say how scores decide
_MISMATCH = "explain does not understand how this cache chooses, please report it"


@dataclasses.dataclass
class Comparison:
    """Tokens that one compression compared, ``[H, n]``; ranks count from 1, among ``rivals`` tokens at a time."""

    positions: Tensor
    scores: Tensor
    ranks: Tensor
    rivals: int


class LayerRecord:
    """One layer's comparisons, and the rows held after the last compression with their positions and scores."""

    def __init__(self, heads: int) -> None:
        self.held = torch.empty(heads, 0, dtype=torch.long)  # positions [H, rows]
        self.scores = torch.empty(heads, 0)  # of the rows held, NaN where they never were compared
        self.seen = 0  # tokens that were there at the last compression
        self.comparisons: list[Comparison] = []

    def add(self, arguments: Mapping[str, Any], scores: Tensor, index: Tensor) -> None:
        """One compression: ``scores [1, H, P - 1, L]`` of the partitions, ``index [1, H, rows left]``.

        ``budget="head"``: all rows from the carried ones on compete; else those of each partition.
        """
        rows = arguments["key"].shape[2]
        start, keep = int(arguments["start"]), int(arguments["keep"])
        new = scores[0].cpu()
        heads, partitions, lag = new.shape
        fresh = rows - self.held.shape[1]
        recent = torch.arange(self.seen, self.seen + fresh).expand(heads, fresh)
        positions = torch.cat([self.held, recent], dim=1)
        known = torch.cat([self.scores.to(new.dtype), new.new_full((heads, fresh), torch.nan)], dim=1)
        known[:, start : start + partitions * lag] = new.flatten(1)
        carried = arguments.get("carried")
        begin, end = start - (0 if carried is None else carried.shape[2]), start + partitions * lag
        if arguments.get("scores") is not None:
            begin = int(arguments["sink_size"])
        shared = carried is not None or arguments.get("budget") == "head"
        groups = known[:, begin:end].unflatten(1, (1, end - begin) if shared else (partitions, lag))
        places = end - begin - partitions * (lag - keep) if shared else keep
        # Stable, NaN first: ties go to the lower position, and what cannot be judged is kept.
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        counting = torch.arange(1, groups.shape[2] + 1).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, counting).flatten(1)
        kept = index[0].cpu().long()[:, : rows - partitions * (lag - keep)]
        chosen = torch.zeros(heads, rows, dtype=torch.bool).scatter_(1, kept, True)
        if not torch.equal(chosen[:, begin:end], rank <= places):
            raise RuntimeError(f"{_MISMATCH}: {_options(arguments)} did not keep the highest scores")
        self.comparisons.append(
            Comparison(positions[:, begin:end], known[:, begin:end].float(), rank, groups.shape[2])
        )
        self.held, self.scores = positions.gather(1, kept), known.gather(1, kept)
        self.seen += fresh

    def shed(self, left: Tensor) -> None:
        """Keep the rows at ``left [1, H, n]`` of those held: a full cache sheds the lowest carried scores."""
        rows = left[0].cpu().long()
        self.held, self.scores = self.held.gather(1, rows), self.scores.gather(1, rows)


class Recorder(TorchFunctionMode):
    """While open, records the compressions of the layer that `layer` names."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, LayerRecord] = {}
        self.layer = -1
        self._left: Tensor | None = None  # rows that the last shedding left

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _operator(func)
        if name is None:
            return func(*args, **kwargs)
        if name in ("topk_index", "compact"):
            if name == "compact" and args[1] is not self._left:  # of keys, then of values
                self._left = args[1]
                self.records[self.layer].shed(args[1])
            return func(*args, **kwargs)
        if name not in _COMPRESS:
            raise RuntimeError(f"explain does not know the operator lagkv::{name}, which this cache calls")
        schema = getattr(torch.ops.lagkv, name).default._schema
        arguments = dict(zip((x.name for x in schema.arguments), args, strict=False)) | kwargs
        scoring = {x.name for x in torch.ops.lagkv.lag_score.default._schema.arguments}
        if unknown := arguments.keys() - scoring - _CHOOSING:
            raise RuntimeError(f"explain does not know the options {sorted(unknown)} of lagkv::{name}")
        # Before the call, which may move the rows.
        scores = torch.ops.lagkv.lag_score(**{k: v for k, v in arguments.items() if k in scoring})
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else result
        index = next(x for x in outputs if x.dtype == torch.int32)
        self.records.setdefault(self.layer, LayerRecord(scores.shape[1])).add(arguments, scores, index)
        return result


class RecordedCache(LagKVCache):
    """A `LagKVCache` whose compressions are recorded, for one sequence; the text is read with it as with any other."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.recorder = Recorder()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.recorder.layer = layer_idx
        with self.recorder:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def recorded(self) -> tuple[Layer, ...]:
        """Every full-attention layer, once the compressions that are due have run.

        Raises RuntimeError: the records do not lead to the tokens that the cache holds.
        """
        return tuple(self._recorded(i) for i in self._lagkv_layers())

    def _recorded(self, i: int) -> Layer:
        self.recorder.layer = i
        with self.recorder:
            self.kept_positions(i)  # runs what is due
        layer = held_layer(self, i)
        heads, tokens = layer.kept.shape
        score = np.full((heads, tokens), np.nan, dtype=np.float32)
        rank, compared = (np.zeros((heads, tokens), dtype=np.int32) for _ in range(2))
        record = self.recorder.records.get(i, LayerRecord(heads))
        for x in record.comparisons:
            where = x.positions.numpy()
            np.put_along_axis(score, where, x.scores.numpy(), axis=1)
            np.put_along_axis(rank, where, x.ranks.numpy().astype(np.int32), axis=1)
            np.put_along_axis(compared, where, np.int32(x.rivals), axis=1)
        expected = np.zeros_like(layer.kept)
        np.put_along_axis(expected, record.held.numpy(), True, axis=1)
        expected[:, record.seen :] = True
        if not np.array_equal(expected, layer.kept):
            raise RuntimeError(f"{_MISMATCH}: layer {i} holds other tokens with {layer.settings}")
        return dataclasses.replace(layer, score=score, rank=rank, compared=compared)


def held_layer(cache: LagKVCache, i: int, sequence: int = 0) -> Layer:
    """Reads what a layer holds of one sequence, without scores."""
    layer = cache.layers[i]
    positions = cache.kept_positions(i)[sequence].cpu().numpy().astype(np.int64)
    seen = int(layer.get_seq_length())
    kept: NDArray[np.bool_] = np.zeros((positions.shape[0], seen), dtype=np.bool_)
    np.put_along_axis(kept, positions, True, axis=1)
    dropped = np.flatnonzero(~kept.all(axis=0))
    settings = dataclasses.asdict(layer.settings)
    # Compressions leave the most recent tokens whole: from one to two partitions and a remainder.
    window = seen - layer.tracks[0].recent if layer.compressions else min(settings["sink_size"], seen)
    assert dropped.size == 0 or dropped[-1] < window
    return Layer(i, settings, layer.compressions, min(settings["sink_size"], seen), window, kept)


def _operator(func: Any) -> str | None:
    """The name of an operator of this library that compresses or chooses; None for anything else."""
    if not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return None
    namespace, _, name = str(func).partition(".")
    return name.removesuffix(".default") if namespace == "lagkv" else None


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if not isinstance(v, Tensor)}
