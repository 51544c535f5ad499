"""The pages on quality: every number in its tables is in a committed results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the evaluation needs numpy")

from lagkv_ext.commands.evaluate import markdown
from lagkv_ext.commands.evaluate.learn_then_test import prompts_needed
from lagkv_ext.commands.evaluate.types import Setting
from tests.evaluate.test_certify import attempt, many

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quality.md"
PAGES = ("docs/quality.md", "benchmarks/results/quality/README.md")


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_results(name):
    page = ROOT / name
    if not page.exists():
        pytest.skip("no docs here: tests run outside a checkout")
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- end -->") >= 1
    assert markdown.rewrite(page) == text, f"run: python -m lagkv_ext.commands.evaluate.markdown {name}"


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
    assert "| method | facts | mean |" in text
    assert "| full cache | 100.0 (100 to 100) | 100.0 |" in text
    assert "| window | 50.0 (50 to 50) ▼ | 50.0 |" in text
    assert "| *rows kept, %* | 40 |  |" in text
    assert "**4x: keep_ratio 0.25** (40% of the rows kept)" in text
    page.write_text("<!-- ablation r.jsonl -->\n<!-- end -->\n")
    assert "| window, L=128, sink=16: 40% | 50.0 (50 to 50) ▼ |" in markdown.rewrite(page)


def _results(path: Path, scores: dict[Setting, list[float]], facts: list[dict] | None = None) -> None:
    versions = {"torch": "1", "transformers": "2"}
    lines = [{"kind": "run", "seed": 0, "model": "m", "dtype": "float32", "versions": versions}]
    for setting, found in scores.items():
        lines += [
            {
                "kind": "result",
                "task": "passkey",
                "sample": str(i),
                "digest": "",
                "setting_name": setting.name,
                "setting": setting.to_json(),
                "tokens": 100,
                "rows": 40,
                "full_layer_bytes": 40,
                "cache_bytes": 40,
                "facts": facts[i] if facts else {},
                "questions": [{"score": score}],
            }
            for i, score in enumerate(found)
        ]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_differences_are_of_the_same_prompts(tmp_path):
    """Prompts differ much more than methods do: only a paired comparison sees a constant difference as one."""
    prompts = [0.1, 0.9, 0.5, 0.3, 0.7, 0.2]
    _results(
        tmp_path / "r.jsonl",
        {
            Setting("full"): [1.0] * 6,
            Setting("lagkv-cosine", 0.25): prompts,
            Setting("mine:better", 0.25): [x + 0.05 for x in prompts],
            Setting("noise", 0.25): [x + d for x, d in zip(prompts, [0.1, -0.1] * 3, strict=True)],
            Setting("lagkv-std", 0.5): [1.0] * 6,
        },
    )
    page = tmp_path / "page.md"
    page.write_text("<!-- against lagkv-cosine r.jsonl -->\nold\n<!-- end -->\n")
    text = markdown.rewrite(page)
    assert text.startswith("<!-- against lagkv-cosine r.jsonl -->\n")
    assert "| better | +5.0 (+5.0 to +5.0) ▲ |" in text
    assert "| noise | +0.0 (-" in text
    assert "lagkv-std" not in text, "another ratio is no comparison"
    page.write_text("<!-- against keydiff r.jsonl -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no results of the method 'keydiff'"):
        markdown.rewrite(page)


def test_heat_tables_have_depths_and_lengths(tmp_path):
    facts = [{"depth": d, "size": n} for d in (0.1, 0.5) for n in (500, 1000)]
    _results(
        tmp_path / "r.jsonl",
        {Setting("full"): [1.0] * 4, Setting("window", 0.25): [0.1, 0.2, 0.3, 0.4]},
        facts,
    )
    page = tmp_path / "page.md"
    page.write_text("<!-- heat r.jsonl -->\n<!-- end -->\n")
    text = markdown.rewrite(page)
    assert "| depth | 500 tokens | 1000 tokens |" in text
    assert "| 10% | 10 | 20 |\n| 50% | 30 | 40 |" in text
    assert "**passkey, full cache**" in text


def test_a_setting_is_held_against_variants_of_its_method_alone(tmp_path):
    settings = [
        Setting("lagkv-std", 0.25),
        Setting("lagkv-std", 0.25, lag_size=64),
        Setting("lagkv-std-k", 0.25),
        Setting("lagkv-cosine", 0.25),
    ]
    _results(
        tmp_path / "r.jsonl",
        {Setting("full"): [1.0] * 5, **{s: [i / 10] * 5 for i, s in enumerate(settings)}},
    )
    page = tmp_path / "page.md"
    page.write_text(f"<!-- against {settings[0].name} r.jsonl -->\n<!-- end -->\n")
    text = markdown.rewrite(page)
    assert "points above lagkv-std, L=128, sink=16**" in text
    assert "| lagkv-std, L=64, sink=16 | +10.0 (+10.0 to +10.0) ▲ |" in text
    assert "| lagkv-std-k, L=128, sink=16 | +20.0" in text
    assert "cosine" not in text


def test_the_table_of_a_guarantee(tmp_path):
    run = {
        "kind": "run",
        "seed": 0,
        "model": "m",
        "dtype": "float32",
        "versions": {"torch": "1", "transformers": "2"},
    }
    plan = {"tolerance": 2.0, "confidence": 0.95}
    lines = many(quarter=range(3))
    lines.append(attempt(lines).to_json())
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in ({**run, "plan": plan}, *lines)))
    page = tmp_path / "page.md"
    page.write_text("<!-- guarantee results.jsonl -->\nold\n<!-- end -->\n")
    table = markdown.rewrite(page)
    assert "**Attempt 1: 200 prompts, 2 points, 95%**" in table
    assert "| lagkv-std@0.5,L=128,sink=16 | 60% | 0.00 | 0.018 | yes |  |" in table
    more = prompts_needed(0.015, 0.02, 0.008, binary=True)
    assert f"| lagkv-std@0.25,L=128,sink=16 | 40% | 1.50 | 0.431 | no | {more:,} |" in table
    assert "The verdict: LagKVCache(model.config, keep_ratio=0.5" in table


def test_the_table_of_wrong_certificates_is_what_the_simulation_gives(capsys):
    """Our columns: kvcalib is not installed with the tests."""
    if not PAGE.exists():
        pytest.skip("no docs here: tests run outside a checkout")
    from benchmarks import certification

    certification.main()

    def ours(text: str) -> list[tuple[str, ...]]:
        rows = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines() if "%" in line]
        return [(*x[:2], *x[-2:]) for x in rows if len(x) == 6 and x[0] in ("100", "200", "400")]

    shown = ours(PAGE.read_text(encoding="utf-8"))
    assert len(shown) == 6
    assert shown == ours(capsys.readouterr().out)
