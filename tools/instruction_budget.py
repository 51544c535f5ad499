"""Budgets of instructions for the streaming loops: tools/instruction_budget.json, by GPU and kernel.

A GPU has a fixed number of issue slots in the time in which it reads a KiB at full bandwidth. A loop that takes nearly
all of them is bound by instructions and not by memory.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

BUDGETS = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Card:
    name: str
    bandwidth: float  #: bytes per second
    multiprocessors: int
    clock: float  #: Hz; four warps issue an instruction per clock

    def share(self, per_kib: float) -> float:
        """Share of all issue slots that full bandwidth takes at so many instructions per KiB."""
        return per_kib * self.bandwidth / 1024 / (4 * self.multiprocessors * self.clock)


CARDS = {"sm_80": Card("A100", 2.039e12, 108, 1.41e9), "sm_90": Card("H100", 3.35e12, 132, 1.755e9)}


def load(path: Path = BUDGETS) -> dict[str, dict[str, int]]:
    return json.loads(path.read_text(encoding="utf-8"))


def faults(counts: dict[str, dict[str, float]], budgets: dict[str, dict[str, int]]) -> list[str]:
    """`counts`: instructions per KiB by architecture and kernel; 0 where no loop was found. Architectures that
    were not compiled are not judged."""
    found = []
    for arch, kernels in counts.items():
        for name, budget in budgets[arch].items():
            if name not in kernels:
                found.append(f"{arch} {name}: has a budget, but there is no such kernel")
            elif not kernels[name]:
                found.append(f"{arch} {name}: no streaming loop was found")
            elif kernels[name] > budget:
                found.append(
                    f"{arch} {name}: {kernels[name]:.1f} instructions per KiB, the budget is {budget}"
                )
    return found


def table(counts: dict[str, dict[str, float]], budgets: dict[str, dict[str, int]]) -> str:
    rows = [
        "Instructions of a warp per KiB of rows, in the loop that streams and scores them (tools/sass.py), and "
        "the share of the GPU's issue slots that they take at full bandwidth.\n",
        "| kernel | GPU | instructions per KiB | budget | issue slots |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for arch, kernels in counts.items():
        for name in budgets[arch]:
            if kernels.get(name):
                share = CARDS[arch].share(kernels[name])
                rows.append(
                    f"| `{name}` | {CARDS[arch].name} | {kernels[name]:.1f} | {budgets[arch][name]} | {share:.0%} |"
                )
    return "\n".join(rows) + "\n"
