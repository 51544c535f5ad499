"""``lagkv.json``: a cache's settings as ``lagkv evaluate`` writes them and the other tools read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The keyword arguments of `LagKVCache`.
NAMES = (
    "lag_size",
    "keep_ratio",
    "keep",
    "sink_size",
    "score",
    "value_weight",
    "order",
    "layer_keep_ratio",
    "skip_layers",
    "max_tokens",
    "quantization",
    "offloading",
    "offload_only_non_sliding",
)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Keyword arguments from a settings file: ``LagKVCache(model.config, **read_settings("lagkv.json"))``.

    The file holds a JSON object of arguments of `LagKVCache`, all optional; layers in ``layer_keep_ratio`` are
    named by their numbers as text, as JSON has no other keys. Values are checked by who uses them.

    Raises ValueError: the file cannot be read, is no JSON object, or has an unknown name.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the settings file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"the settings file {path} is no JSON: {error}") from error
    return checked_settings(data, f"the settings file {path}")


def checked_settings(data: Any, source: str) -> dict[str, Any]:
    """Keyword arguments of `LagKVCache` from parsed JSON; ``source`` says in messages where that was read.

    Raises ValueError: no object, or an unknown name.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(data).__name__}")
    if unknown := [name for name in data if name not in NAMES]:
        raise ValueError(f"{source} has the unknown name {unknown[0]!r}; known: {', '.join(NAMES)}")
    if (ratios := data.get("layer_keep_ratio")) is not None:
        if not isinstance(ratios, dict) or not all(k.removeprefix("-").isdecimal() for k in ratios):
            raise ValueError(
                f"{source}: layer_keep_ratio must be an object of layer numbers and ratios, got {ratios!r}"
            )
        data = {**data, "layer_keep_ratio": {int(k): v for k, v in ratios.items()}}
    return data


def settings_text(arguments: Mapping[str, Any]) -> str:
    """What `read_settings` reads back as ``arguments``, keyword arguments of `LagKVCache`."""
    # json makes text of the layers' numbers by itself.
    return json.dumps(dict(arguments), indent=2) + "\n"
