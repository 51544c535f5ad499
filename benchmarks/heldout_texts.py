"""Texts for ``lagkv evaluate --data``: parts of Python's own documentation and standard library, in two sets.

``python -m benchmarks.heldout_texts FOLDER`` writes ``FOLDER/search`` and ``FOLDER/heldout``: scores are looked for on
the first and judged on the second. The texts are those of the Python that runs this; docs/quality.md names its version.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from pydoc_data.topics import topics

# About 1,000 tokens with their continuation. Every other text is code.
LENGTH = 4600
SETS = {
    "search": ("customization", "argparse", "comparisons", "tarfile", "strings"),
    "heldout": (
        "assignment", "csv", "execmodel", "difflib", "formatstrings",
        "fractions", "import", "heapq", "typesseq", "statistics",
    ),
}  # fmt: skip


def text(name: str) -> str:
    """A topic of the language reference, or the source of a module.

    Raises SystemExit where it is not there or shorter than `LENGTH`.
    """
    spec = None if name in topics else importlib.util.find_spec(name)
    found = (
        topics.get(name, "")
        if spec is None or spec.origin is None
        else Path(spec.origin).read_text(encoding="utf-8")
    )
    if len(found) < LENGTH:
        raise SystemExit(f"this Python has no topic or module {name!r} of {LENGTH} characters")
    return found[:LENGTH]


def main(folder: Path) -> None:
    """Write both sets."""
    for part, names in SETS.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / part / f"{name}.txt").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
