"""Proof on your own data: how far a model's cache can shrink before answers suffer, and what that saves.

``lagkv evaluate`` on the command line; here the same as a library: `Plan`, `evaluate`, `report_again`. Needs
``pip install 'lagkv_ext[evaluation]'``; names are imported at their first use, so that the command can say so.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lagkv_ext.commands.evaluate.run import Outcome, Plan, evaluate, report_again
    from lagkv_ext.commands.evaluate.types import EvaluationError, Question, Sample, Setting

__all__ = [
    "EvaluationError",
    "Outcome",
    "Plan",
    "Question",
    "Sample",
    "Setting",
    "evaluate",
    "report_again",
]

_WHERE = {
    "EvaluationError": "types",
    "Outcome": "run",
    "Plan": "run",
    "Question": "types",
    "Sample": "types",
    "Setting": "types",
    "evaluate": "run",
    "report_again": "run",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"lagkv_ext.commands.evaluate.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
