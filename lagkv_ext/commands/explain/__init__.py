"""Shows what a compressed cache kept of a text: token by token, for every layer and head.

``lagkv explain`` on the command line; here the same as a library: `explain` (a model and a text), `explain_saved` (a
file of ``LagKVCache.save``), and the result's `Explanation.to_json` and `html`. Names are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lagkv_ext.commands.explain.explanation import ExplainError, Explanation, Layer, Tokens
    from lagkv_ext.commands.explain.page import html
    from lagkv_ext.commands.explain.run import explain, explain_saved

_WHERE = {
    "ExplainError": "explanation",
    "Explanation": "explanation",
    "Layer": "explanation",
    "Tokens": "explanation",
    "explain": "run",
    "explain_saved": "run",
    "html": "page",
}

__all__ = ["ExplainError", "Explanation", "Layer", "Tokens", "explain", "explain_saved", "html"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"lagkv_ext.commands.explain.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
