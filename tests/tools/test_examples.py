"""Every file in examples/ runs as it stands, offline and in seconds, and is short enough to be read at once."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_the_pages_name_every_example() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"\(\.\./examples/(\w+)\.py\)", page)}
    assert {path.stem for path in EXAMPLES} == named


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda x: x.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture) -> None:
    source = path.read_text(encoding="utf-8")
    if "transformers" in source:
        pytest.importorskip("transformers", reason="this example needs transformers")
    assert len(source.splitlines()) <= 20
    assert source.startswith('"""')
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example shows what it did"
