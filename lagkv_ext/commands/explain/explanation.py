"""Tokens of a text that a cache kept, as data; and as JSON, whose schema is documented in docs/operations.md."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "lagkv_ext.explanation"
VERSION = 1


class ExplainError(Exception):
    """Something that the user can mend: the message says what was wrong, and what to do."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, ``N`` of them; other fields have indices of tokens.

    ``pieces``: the text that each token stands for. ``parts``: tokens that share a character with a neighbour.
    ``between``: text before a token (or, with the index ``N``, after the last) that has no token.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    special: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    between: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One full-attention layer. Arrays are ``[H, N]``: heads, tokens.

    ``rank`` counts from 1 among the ``compared`` tokens that a token was compared with the last time, the highest
    ``score`` first; 0 and NaN where it never was. None where they are not known: a saved cache does not hold them.
    """

    index: int
    settings: dict[str, Any]
    compressions: int
    sink: int  # leading tokens that are always kept
    window: int  # first of the most recent tokens, all of which are kept
    kept: NDArray[np.bool_]
    score: NDArray[np.float32] | None = None
    rank: NDArray[np.int32] | None = None
    compared: NDArray[np.int32] | None = None

    @property
    def heads(self) -> int:
        return self.kept.shape[0]

    def nan_scores(self) -> int:
        """Scores that are NaN: the model's keys or values were not finite there, and the token was kept."""
        return (
            0 if self.score is None or self.rank is None else int(np.isnan(self.score[self.rank > 0]).sum())
        )


@dataclass(frozen=True)
class Explanation:
    """Tokens that a cache holds of the ``tokens_seen`` given to it.

    ``tokens`` is None where the text is not known, and shorter than ``tokens_seen`` where the cache went on after it.
    ``uncompressed``: layers of other kinds, by index, which keep what transformers keeps.
    """

    model: str
    source: str  # "model" or "saved cache"
    tokens_seen: int
    layers: tuple[Layer, ...]
    tokens: Tokens | None = None
    uncompressed: dict[int, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)  # of LagKVCache, as given
    chunk: int | None = None  # tokens read at a time; None: all in one piece

    def share(self, layer: int | None = None) -> NDArray[np.float64]:
        """``[N]``: share of the heads that hold each token, of all layers here or of the one with this index."""
        kept = [x.kept for x in self.layers if layer is None or x.index == layer]
        if not kept:
            raise ValueError(f"layer must be one of {[x.index for x in self.layers]}, got {layer}")
        return np.concatenate(kept).mean(axis=0)

    def notes(self) -> list[str]:
        """Notes that a reader needs to judge the page."""
        found = []
        if all(x.compressions == 0 for x in self.layers):
            settings = self.layers[0].settings
            shortest = settings["sink_size"] + 2 * settings["lag_size"]
            compresses = any(x.settings["keep"] < x.settings["lag_size"] for x in self.layers)
            why = (
                f"nothing is compressed below sink_size + 2 * lag_size = {shortest} tokens"
                if compresses
                else "the settings keep every token of each partition"
            )
            found.append(f"Nothing was dropped of {counted(self.tokens_seen, 'token')}: {why}.")
        if self.source == "saved cache":
            found.append(
                "From a saved cache: it holds which tokens were kept, but not their scores and ranks, nor the text."
            )
            if self.tokens is not None:
                found.append(
                    "The text is the one that was given with it; nothing tells whether it is the right one."
                )
        if self.tokens is not None and len(self.tokens.ids) < self.tokens_seen:
            found.append(
                f"The text has {len(self.tokens.ids)} tokens and the cache has seen {self.tokens_seen}: the rest is "
                "shown by position."
            )
        if self.tokens is not None and self.tokens.unknown:
            found.append(
                f"{len(self.tokens.unknown)} of {len(self.tokens.ids)} tokens stand for text that the tokenizer does "
                "not know."
            )
        if nan := sum(x.nan_scores() for x in self.layers):
            found.append(
                f"{counted(nan, 'score')} of tokens and heads came out as NaN, because keys or values of the model are "
                "not finite there. Such tokens are kept, since nothing tells what they are worth."
            )
        if self.uncompressed:
            kinds = ", ".join(sorted(set(self.uncompressed.values())))
            found.append(
                f"Not shown: {counted(len(self.uncompressed), 'layer')} of other kinds, which LagKV does not compress "
                f"({kinds})."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The documented schema: plain JSON, arrays as base64 (`array_json`)."""
        tokens = None
        if self.tokens is not None:
            lists = {k: list(v) for k, v in vars(self.tokens).items() if k != "between"}
            tokens = {**lists, "between": {str(i): text for i, text in self.tokens.between.items()}}
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "source": self.source,
            "arguments": _plain(self.arguments),
            "chunk": self.chunk,
            "tokens_seen": self.tokens_seen,
            "tokens": tokens,
            "uncompressed": {str(i): kind for i, kind in self.uncompressed.items()},
            "notes": self.notes(),
            "layers": [
                {
                    "index": x.index,
                    "settings": _plain(x.settings),
                    "heads": x.heads,
                    "compressions": x.compressions,
                    "sink": x.sink,
                    "window": x.window,
                    **{
                        name: None if value is None else array_json(value)
                        for name in ("kept", "score", "rank", "compared")
                        for value in [getattr(x, name)]
                    },
                }
                for x in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Explanation:
        """From `to_json`. Raises ExplainError: not an explanation, of another version, or damaged."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ExplainError(f"this is no explanation of lagkv_ext: its format is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ExplainError(
                f"the explanation has version {data.get('version')}, this library reads {VERSION}"
            )
        try:
            tokens = data["tokens"]
            if tokens is not None:
                between = {int(i): text for i, text in tokens["between"].items()}
                lists = {k: tuple(v) for k, v in tokens.items() if k != "between"}
                tokens = Tokens(**lists, between=between)
            layers = tuple(
                Layer(
                    x["index"],
                    x["settings"],
                    x["compressions"],
                    x["sink"],
                    x["window"],
                    array_of(x["kept"]),
                    **{k: None if x[k] is None else array_of(x[k]) for k in ("score", "rank", "compared")},
                )
                for x in data["layers"]
            )
            return cls(
                data["model"],
                data["source"],
                data["tokens_seen"],
                layers,
                tokens,
                {int(i): kind for i, kind in data["uncompressed"].items()},
                data["arguments"],
                data["chunk"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExplainError(f"the explanation is damaged: {error}") from error


def array_json(array: NDArray[Any]) -> dict[str, Any]:
    """``{"dtype", "shape", "base64"}``: the elements in C order, little-endian.

    bool: dtype "bits", eight elements of the last dimension a byte, the first in the lowest bit, rows padded to bytes.
    """
    if array.dtype == np.bool_:
        data, dtype = np.packbits(array, axis=-1, bitorder="little"), "bits"
    else:
        data, dtype = np.ascontiguousarray(array, array.dtype.newbyteorder("<")), array.dtype.name
    return {"dtype": dtype, "shape": list(array.shape), "base64": base64.b64encode(data.tobytes()).decode()}


def array_of(data: Mapping[str, Any]) -> NDArray[Any]:
    """From `array_json`. Raises KeyError, TypeError or ValueError where it does not fit its shape."""
    shape, raw = tuple(data["shape"]), base64.b64decode(data["base64"], validate=True)
    if data["dtype"] == "bits":
        packed = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -(-shape[-1] // 8))
        return np.unpackbits(packed, axis=-1, count=shape[-1], bitorder="little").astype(np.bool_)
    return np.frombuffer(raw, np.dtype(data["dtype"]).newbyteorder("<")).reshape(shape).astype(data["dtype"])


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments or settings as JSON has them: layers by text, tuples as lists."""
    return {
        name: {str(k): v for k, v in value.items()}
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, (list, tuple, set, range))
        else value
        for name, value in arguments.items()
    }
