"""tools/kernel_rules.json names text that the kernels hold, so that every entry still is a mutant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutate_kernels", ROOT / "tools" / "mutate_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield [*module.barriers(), *module.rules()]
    finally:
        del sys.modules[spec.name]


def test_every_rule_changes_the_file_that_it_names(mutants):
    assert len(mutants) > 250
    stale = []
    for mutant in mutants:
        text = (ROOT / "csrc" / "cuda" / mutant.file).read_text(encoding="utf-8")
        if mutant.find not in text or text.replace(mutant.find, mutant.replace) == text:
            stale.append(f"{mutant.file}: {mutant.what}")
    assert not stale


def test_no_two_rules_are_the_same_mutant(mutants):
    changes = [mutant._replace(what="") for mutant in mutants]
    assert len(set(changes)) == len(changes)
    names = [(mutant.file, mutant.what, mutant.dtype) for mutant in mutants]
    assert len(set(names)) == len(names)
