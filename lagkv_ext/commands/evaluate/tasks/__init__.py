"""The tasks: functions that make samples, from a seed or from files. `build` makes those of a preset by name."""

from __future__ import annotations

from lagkv_ext.commands.evaluate.tasks.build import TASKS, Counter, Spec, build

__all__ = ["TASKS", "Counter", "Spec", "build"]
