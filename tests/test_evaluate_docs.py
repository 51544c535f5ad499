"""docs/quality.md: every number in its tables is in a committed results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lagkv_ext.evaluate import markdown
from lagkv_ext.evaluate.types import Setting

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"


def test_tables_are_those_of_the_results():
    if not PAGE.exists():
        pytest.skip("no docs here: tests run outside a checkout")
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- end -->") >= 1
    assert markdown.rewrite(PAGE) == text, "run: python -m lagkv_ext.evaluate.markdown docs/quality.md"


def test_tables_of_known_results(tmp_path):
    lines: list[dict] = [
        {
            "kind": "run",
            "seed": 0,
            "model": "m",
            "dtype": "float32",
            "versions": {"torch": "1", "transformers": "2"},
        }
    ]
    for setting, score, rows in ((Setting("full"), 1.0, 100), (Setting("window", 0.25), 0.5, 40)):
        for i in range(5):
            lines.append(
                {
                    "kind": "result",
                    "task": "facts",
                    "sample": str(i),
                    "digest": "",
                    "setting_name": setting.name,
                    "setting": setting.to_json(),
                    "tokens": 100,
                    "rows": rows,
                    "full_layer_bytes": rows,
                    "cache_bytes": rows,
                    "questions": [{"score": score}],
                }
            )
    # A task that was interrupted before all settings had their prompts.
    lines.append({**lines[1], "task": "half"})
    lines.append({**lines[2], "task": "half"})
    lines.append({**lines[6], "task": "half"})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results r.jsonl -->\nold\n<!-- end -->\nafter\n")
    text = markdown.rewrite(page)
    assert text.startswith("before\n<!-- results r.jsonl -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "Unfinished, and not shown: half." in text
    assert "half |" not in text
    assert "| full cache | 100.0 (100 to 100) |" in text
    assert "| window | 50.0 (50 to 50) ▼ |" in text
    assert "**4x: keep_ratio 0.25** (40% of the rows kept)" in text
    page.write_text("<!-- ablation r.jsonl -->\n<!-- end -->\n")
    assert "| window, L=128, sink=16: 40% | 50.0 (50 to 50) ▼ |" in markdown.rewrite(page)
