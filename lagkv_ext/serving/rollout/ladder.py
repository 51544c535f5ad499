"""``lagkv-ladder.json``: settings from the largest cache to the smallest, as the evaluation found them acceptable.

``lagkv evaluate`` writes it. ``lagkv rollout set --ladder`` copies its rungs into a rollout file, where the ratio then
adapts to the traffic::

    {
      "format": "lagkv-ladder-1",
      "model": "gemma3-270m",
      "rungs": [
        {"settings": {"keep_ratio": 0.5, "lag_size": 128}, "rows": 0.62, "agreement": 0.995, "kl": 0.004},
        {"settings": {"keep_ratio": 0.25, "lag_size": 128}, "rows": 0.41, "agreement": 0.989}
      ]
    }
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lagkv_ext.serving.rollout.policy import RolloutError, check_rungs, number, read_object, text_of
from lagkv_ext.settings_file import checked_settings

FORMAT = "lagkv-ladder-1"


@dataclass(frozen=True)
class Rung:
    """One setting of a ladder, with what the evaluation measured of it."""

    settings: Mapping[str, Any] = field(hash=False)  #: arguments of `LagKVCache`
    rows: float | None = None  #: share of the full-attention layers' bytes held, in (0, 1]
    agreement: float | None = None  #: share of tokens on which the full cache agrees, in [0, 1]
    kl: float | None = None  #: mean KL(full || compressed), nats per token


@dataclass(frozen=True)
class Ladder:
    """Content of a ladder file."""

    rungs: tuple[Rung, ...]  #: from the largest cache to the smallest
    model: str | None = None  #: of the evaluation

    @property
    def text(self) -> str:
        """The file that `read_ladder` reads back as an equal ladder."""
        rungs = [
            {
                name: value
                for name, value in (("settings", dict(x.settings)), *_measured(x))
                if value is not None
            }
            for x in self.rungs
        ]
        model = {} if self.model is None else {"model": self.model}
        return json.dumps({"format": FORMAT, **model, "rungs": rungs}, indent=2) + "\n"


def read_ladder(path: str | Path) -> Ladder:
    """Reads a ladder file, checked completely.

    Raises RolloutError: the file cannot be read or is no ladder; settings that no cache takes; rungs that are equal, or
    whose ``rows`` do not decrease.
    """
    source = f"the ladder file {path}"
    try:
        text = text_of(Path(path), source)
    except OSError as error:
        raise RolloutError(f"{source} cannot be read: {error.strerror or error}") from error
    return parse_ladder(text, source)


def parse_ladder(text: str, source: str) -> Ladder:
    """As `read_ladder`; ``source`` names the text in messages."""
    data = read_object(text, source)
    if data.get("format") != FORMAT:
        raise RolloutError(f"{source} must have the format {FORMAT!r}, got {data.get('format')!r}")
    _known(source, data, ("format", "model", "rungs"))
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise RolloutError(f"{source}: model must be a string, got {model!r}")
    rungs = data.get("rungs")
    if not isinstance(rungs, list) or not rungs:
        raise RolloutError(f"{source}: rungs must be a list of at least one rung, got {rungs!r}")
    found = tuple(_rung(f"{source}: rung {i}", rung) for i, rung in enumerate(rungs))
    check_rungs([x.settings for x in found], source)
    rows = [x.rows for x in found if x.rows is not None]
    for larger, smaller in itertools.pairwise(rows):
        if not smaller < larger:
            raise RolloutError(
                f"{source}: rungs must go from the largest cache to the smallest, got rows {smaller} after {larger}"
            )
    return Ladder(found, model)


def _rung(source: str, data: Any) -> Rung:
    if not isinstance(data, dict):
        raise RolloutError(f"{source} must be an object, got {data!r}")
    _known(source, data, ("settings", "rows", "agreement", "kl"))
    if "settings" not in data:
        raise RolloutError(f"{source} must have 'settings'")
    try:
        settings = checked_settings(data["settings"], f"{source}: settings")
    except ValueError as error:
        raise RolloutError(str(error)) from None
    bounds = {"rows": (0, 1, True), "agreement": (0, 1, False), "kl": (0, math.inf, False)}
    measured = {name: data[name] for name in bounds if data.get(name) is not None}
    for name, value in measured.items():
        low, high, above = bounds[name]
        try:
            number(name, value, low, high, above=above)
        except RolloutError as error:
            raise RolloutError(f"{source}: {error}") from None
    return Rung(settings, **measured)


def _measured(rung: Rung) -> tuple[tuple[str, float | None], ...]:
    return ("rows", rung.rows), ("agreement", rung.agreement), ("kl", rung.kl)


def _known(source: str, data: Mapping[str, Any], names: Sequence[str]) -> None:
    if unknown := [name for name in data if name not in names]:
        raise RolloutError(f"{source} has the unknown name {unknown[0]!r}; known: {', '.join(names)}")
