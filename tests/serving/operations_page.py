"""docs/operations.md for the tests: its blocks by heading, and a model that its commands can use."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch

from tests.evaluate import tiny_models as characters

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """From a heading of the second or third level to the next one of its level or above."""
    match = re.search(rf"^(##+) {re.escape(heading)}$", PAGE, re.MULTILINE)
    assert match, f"docs/operations.md has no section {heading!r}"
    rest = PAGE[match.end() :]
    end = re.search(rf"^#{{2,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def blocks(heading: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(heading), re.DOTALL | re.MULTILINE)


def save_model(folder: Path) -> Any:
    """A tiny model of characters whose attention adds nothing, so that no cache changes its answers."""
    model = copy.deepcopy(characters.model())
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "o_proj" in name:
                weights.zero_()
    model.save_pretrained(folder)
    characters.tokenizer().save_pretrained(folder)
    return model
