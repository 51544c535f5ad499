"""--only-gpu-skips: in CI a test that is skipped for want of a package fails, one that needs a card does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no card")
def test_card(): pass

@pytest.mark.no_gpu
@pytest.mark.skipif(True, reason="there is a card")
def test_no_card(): pass

@pytest.mark.skipif(True, reason="no program")
def test_program(): pass

def test_package():
    pytest.importorskip("no_such_package")

@pytest.fixture
def thing():
    pytest.skip("no thing")

def test_thing(thing): pass

@pytest.mark.xfail(reason="known")
def test_known(): assert False

def test_good(): pass
"""
MODULE = 'import pytest\npytest.importorskip("no_such_package")\ndef test_hidden(): pass\n'


def test_skips_for_other_reasons_fail(tmp_path: Path) -> None:
    (tmp_path / "test_items.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(MODULE)

    def run(*options: str) -> tuple[str, dict[str, int]]:
        command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", ROOT / "pyproject.toml"]
        done = subprocess.run(
            [
                *command,
                "--rootdir",
                tmp_path,
                tmp_path,
                "-q",
                "-n",
                "1",
                "--continue-on-collection-errors",
                *options,
            ],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
        )
        counts = re.findall(r"(\d+) (\w+?)s?\b", done.stdout.splitlines()[-1])
        return done.stdout, {name: int(count) for count, name in counts if name != "in"}

    there = torch.cuda.is_available()
    text, counts = run("--only-gpu-skips")
    assert counts == {"passed": 1, "xfailed": 1, "skipped": 1, "failed": 1, "error": 4}, text
    for reason in (
        "no card" if there else "there is a card",
        "no program",
        "no thing",
        "could not import 'no_such_package'",
    ):
        assert re.search(rf"must not be skipped \(--only-gpu-skips\): .*{reason}", text), text
    assert run()[1] == {"passed": 1, "xfailed": 1, "skipped": 6}
