"""``lagkv.json``: a cache's settings as ``lagkv evaluate`` writes them and the other tools read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lagkv_ext import arguments
from lagkv_ext.user_files import parse_object, read_text

# The keyword arguments of `LagKVCache`.
NAMES = (
    "lag_size",
    "keep_ratio",
    "keep",
    "sink_size",
    "score",
    "value_weight",
    "smooth",
    "budget",
    "layer_keep_ratio",
    "skip_layers",
    "max_tokens",
    "quantization",
    "boundary",
    "offloading",
    "offload_only_non_sliding",
)
# A note on where the settings come from: any JSON, for people and other tools.
ABOUT = "about"

#: The one value of "order" that settings of version 1 may still have.
ORDER = "use_then_compress"


def read_settings(path: str | Path) -> dict[str, Any]:
    """Keyword arguments from a settings file: ``LagKVCache(model.config, **read_settings("lagkv.json"))``.

    The file has a JSON object with arguments of `LagKVCache`, all optional. ``layer_keep_ratio`` names layers by their
    numbers as text, since JSON has no other keys. The cache checks the values. A member ``about`` is a note for people
    and is left out.

    Raises TypeError: no path. ValueError: the file cannot be read, is not a JSON object, or has an unknown name.
    """
    path = arguments.path("path", path)
    source = f"the settings file {path}"
    try:
        text = read_text(path, source)
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}") from error
    return checked_settings(parse_object(text, source), source)


def checked_settings(data: Any, source: str) -> dict[str, Any]:
    """Keyword arguments of `LagKVCache` from parsed JSON; ``source`` names its origin in messages.

    Raises ValueError: ``data`` is not an object, or has an unknown name.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{source} must have a JSON object, got {type(data).__name__}")
    data = {name: value for name, value in without_order(data, source).items() if name != ABOUT}
    if unknown := [name for name in data if name not in NAMES]:
        raise ValueError(f"{source} has the unknown name {unknown[0]!r}; known: {', '.join(NAMES)}")
    if (ratios := data.get("layer_keep_ratio")) is not None:
        if not isinstance(ratios, dict) or not all(k.removeprefix("-").isdecimal() for k in ratios):
            raise ValueError(
                f"{source}: layer_keep_ratio must be an object of layer numbers and ratios, got {ratios!r}"
            )
        data = {**data, "layer_keep_ratio": {int(k): v for k, v in ratios.items()}}
    return data


def without_order(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings without ``order``, which version 1 of the files could name; ``source`` says where they were read.

    Raises ValueError: an order other than the one that is left.
    """
    order = data.get("order", ORDER)
    if order != ORDER:
        raise ValueError(
            f"{source}: order must be {ORDER!r}, got {order!r}: attention of a step always sees the cache as it was "
            "before the compression that the step sets off; 'compress_then_use' made no measurable difference and was "
            'removed. Delete "order"'
        )
    return {name: value for name, value in data.items() if name != "order"}


def settings_text(arguments: Mapping[str, Any], about: Any = None) -> str:
    """The text that `read_settings` reads back as ``arguments``, keyword arguments of `LagKVCache`. ``about``: a note
    in JSON that goes with them.
    """
    note = {} if about is None else {ABOUT: about}
    # json converts the layers' numbers to text.
    return json.dumps({**arguments, **note}, indent=2) + "\n"
