"""``benchmarks.record`` and ``benchmarks.tables``: steps run and are told, tables hold the files' numbers. No times."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is a package of the checkout, not of the installation

from benchmarks import record, report, run, tables, vllm_table  # noqa: E402

SMALL = "--tokens 512,1k --shapes gemma-3-270m --dtype float32 --threads 1 --rounds 2 --lag-size 32 --no-model-cuda"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as record leaves it, with one step that really ran as a process and one from this process."""
    results = tmp_path_factory.mktemp("results")
    assert record.main(["try", "--tiny", "--only", "fixed-cost", "--results", str(results)]) == 0
    made = results / "try"
    told = json.loads((made / "record.json").read_text())
    contenders = ["--contenders", "compress_,compress,copy,clone"]
    assert run.main([*SMALL.split(), *contenders, "--json", str(made / "linear.json")]) == 0
    for name in ("operators", "huge-pages"):
        (made / f"{name}.json").write_text((made / "linear.json").read_text())
    for name in ("linear", "operators", "huge-pages"):
        told["steps"][name] = {"command": "", "commit": "abc", "seconds": 1.0, "exit": 0}
    (made / "record.json").write_text(json.dumps(told))
    return made


def test_steps_are_recorded_with_command_and_outcome(folder):
    told = json.loads((folder / "record.json").read_text())
    step = told["steps"]["fixed-cost"]
    assert step["exit"] == 0
    assert step["command"].startswith("python -m benchmarks.fixed_cost")
    assert str(folder) not in json.dumps(told)
    assert {"processor", "torch", "cores"} <= set(told["machine"])


def test_the_tables_hold_the_numbers_of_the_files(folder):
    text = tables.markdown(folder)
    content = json.loads((folder / "linear.json").read_text())
    for case in content["cases"]:
        x = case["ratios"]["compress_/copy"]
        assert report.number(x["median"]) + " (" in text
        tokens = case["problem"]["tokens"]
        per_token = report.number(1e9 * case["contenders"]["compress_"]["seconds"]["median"] / tokens)
        assert f" {per_token} |" in text
    assert "Fixed cost of a call" in text
    assert "THP_MEM_ALLOC_ENABLE=1" in text
    assert content["machine"]["torch"] in text
    for lines in re.findall(
        r"(?:^\|.*\n?)+", text, re.MULTILINE
    ):  # every table has as many cells in all rows
        assert len({line.count("|") for line in lines.strip().splitlines()}) == 1


def test_a_missed_target_is_bold_and_a_met_one_is_not():
    spread = {"q1": 0.9, "q3": 1.2, "best": 0.9, "count": 3}
    case = {"checks": {}, "ratios": {"compress_/copy": {"median": 1.05, **spread}}}
    assert tables.ratio(case, ("compress_", "copy")) == "**1.05 (0.900 .. 1.20)**"
    case["ratios"]["compress_/copy"]["median"] = 0.95
    assert tables.ratio(case, ("compress_", "copy")) == "0.950 (0.900 .. 1.20)"
    case = {"checks": {"compress_": {"green": False}}, "ratios": {}}
    assert tables.ratio(case, ("compress_", "copy")) == "red"


def test_writing_replaces_what_is_between_the_markers(folder, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for _ in range(2):
        assert tables.main([str(folder), "--write", str(page)]) == 0
        assert (
            page.read_text()
            == f"before\n{tables.BEGIN}\n\n{tables.markdown(folder)}\n\n{tables.END}\nafter\n"
        )
    page.write_text("no markers")
    assert tables.main([str(folder), "--write", str(page)]) == 2
    assert "must have one line" in capsys.readouterr().err
    assert page.read_text() == "no markers"


def test_refusals(tmp_path, capsys):
    assert record.main(["try", "--only", "nothing", "--results", str(tmp_path)]) == 2
    assert "unknown step 'nothing'; known: operators" in capsys.readouterr().err
    assert record.main(["../up", "--results", str(tmp_path)]) == 2
    assert "NAME must be" in capsys.readouterr().err
    assert tables.main([str(tmp_path)]) == 2
    assert "record.json is missing" in capsys.readouterr().err


def test_what_comes_too_late_is_left_out_by_name(tmp_path, capsys):
    assert record.main(["try", "--tiny", "--minutes", "-1", "--results", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "linear: left out" in captured.out
    assert "failed or left out: operators, fixed-cost" in captured.err


def test_the_page_has_what_its_folder_gives():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1
    written = text.split(tables.BEGIN)[1].split(tables.END)[0].strip()
    (name,) = re.findall(r"\(\.\./benchmarks/results/([a-z0-9.-]+)\)", written)
    assert written == tables.markdown(ROOT / "benchmarks" / "results" / name)


def test_the_simulated_table_of_vllm_is_that_of_the_committed_rows():
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    rows = vllm_table.table(ROOT / "benchmarks" / "results" / "vllm-simulated" / "rows.jsonl")
    assert f"<!-- benchmarks.vllm_table -->\n{rows}<!-- end -->" in page
