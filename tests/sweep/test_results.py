"""Committed results of the sweep: complete, without differences, and the same as code and documentation say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import transformers

from lagkv_ext.cache import models
from tests.sweep import families, table, tiny
from tests.sweep.verdict import CANNOT_BE_MADE, EQUAL, REFUSED

VERSION, VERDICTS = table.of_json(table.RESULTS.read_text())
SAME_VERSION = transformers.__version__ == VERSION
#: Families of the results that the installed transformers has, which may be another version.
FAMILIES = {x.case.split(" (")[0] for x in VERDICTS} & set(families.families())


def model_types(family: str) -> set[str]:
    config = tiny.tiny_config(families.config_class(family), dict(families.cases(family)[0].changes))
    return {config.model_type, config.get_text_config(decoder=True).model_type}


def test_no_silent_difference():
    assert {x.status for x in VERDICTS} == {EQUAL, REFUSED, CANNOT_BE_MADE}


def test_every_refusal_is_measured():
    """The sweep knows of every family that is refused what goes wrong with transformers' own cache. GPT-2 with an
    encoder gives the encoder's rows a cache of their own, which no configuration tells."""
    without = [x.case for x in VERDICTS if x.status == REFUSED and not x.evidence]
    assert without == ["gpt2 (with an encoder)"]


def test_the_results_are_complete():
    wanted = families.families() if SAME_VERSION else sorted(FAMILIES)
    cases = [case.name for family in wanted for case in families.cases(family)]
    assert sorted(cases) == [x.case for x in VERDICTS if x.case.split(" (")[0] in wanted]


def test_the_caches_serve_what_was_found_equal():
    equal = {x.case.split(" (")[0] for x in VERDICTS if x.status == EQUAL}
    found = set().union(*(model_types(family) for family in equal & FAMILIES))
    served = models.SERVED | set(models.ENCODER_DECODERS)
    assert found <= served
    assert found == served or not SAME_VERSION


def test_the_page_has_the_committed_tables():
    page = table.PAGE.read_text()
    assert table.BEGIN in page, "docs/cache.md has lost the place of its tables"
    between = page.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert between == table.markdown(VERSION, VERDICTS), "run python -m tests.sweep.table"


def test_json_goes_there_and_back():
    assert table.of_json(table.to_json(VERDICTS))[1] == VERDICTS


def test_the_command(tmp_path):
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "tests.sweep",
        "--jobs",
        "1",
        "--json",
        str(out),
        "--markdown",
        "--family",
        "rwkv",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| refused: keeps no key-value cache of transformers: it is recurrent | rwkv |" in done.stdout
    assert "1 refused" in done.stderr
    (verdict,) = json.loads(out.read_text())["verdicts"]
    assert (verdict["case"], verdict["status"]) == ("rwkv", REFUSED)
