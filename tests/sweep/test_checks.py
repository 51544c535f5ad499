"""The sweep sees what it is there to see: everything that this test breaks comes out as different."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
from transformers import DynamicCache

from lagkv_ext import LagKVCache
from lagkv_ext.cache import models
from tests.sweep import checks, families, tiny
from tests.sweep.subject import NothingToCompare, Subject
from tests.sweep.verdict import DIFFERENT, EQUAL, REFUSED, Outcome, judge


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _admitted(monkeypatch):
    monkeypatch.setattr(models, "_admitted", set())


def subject(family: str) -> Subject:
    case = families.cases(family)[0]
    config = tiny.tiny_config(families.config_class(family), dict(case.changes))
    return Subject(tiny.tiny_model(families.auto_class(case), config, "eager", torch.float32), case)


def break_cache(monkeypatch, name, value):
    """Replace a function where the cache has imported it."""
    monkeypatch.setattr(sys.modules[LagKVCache.__module__], name, value)


def test_local_layers_that_are_compressed(monkeypatch):
    break_cache(monkeypatch, "uncompressed_layers", lambda config: {})
    with pytest.raises(checks.Different, match="layer 1 is compressed, and its rows in another order"):
        checks.layers(subject("gpt_neo"))


def test_cross_attention_layers_that_are_compressed(monkeypatch):
    break_cache(monkeypatch, "cross_attention_layers", lambda config: frozenset())
    with pytest.raises(checks.Different, match="layer 1 is compressed, and its 7 rows are not the 40 tokens"):
        checks.layers(subject("mllama"))


@pytest.mark.parametrize("family", ["bloom", "doge", "diffllama"])
def test_families_whose_rows_are_no_set(monkeypatch, family):
    monkeypatch.setattr(models, "REFUSED", {})
    monkeypatch.setattr(models, "_REFUSED_WITH_HEADS", {})
    models.admit(family)
    with pytest.raises(checks.Different, match="its rows in another order, another in every head"):
        checks.layers(subject(family))


def test_windows_in_layers_with_caches_of_all_tokens(monkeypatch):
    """Caches made without a configuration hold all tokens everywhere, and the mask alone makes the windows."""
    model = subject("gemma3_text")
    ids, cache = model.tokens(checks.PROMPT + 1), DynamicCache()
    model.forward(cache, ids, [checks.PROMPT])
    kinds = model.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    for layer, kind in enumerate(kinds):
        assert (checks._sees_a_set(model, cache, layer, ids) is None) == (kind == "full_attention")


def test_rows_that_are_not_those_of_the_operator(monkeypatch):
    make = checks._cache
    monkeypatch.setattr(checks, "_cache", lambda subject, **more: make(subject, score="cosine", **more))
    with pytest.raises(checks.Different, match="layer 0 holds other rows than the operator leaves"):
        checks.rows(subject("llama"))


def test_positions_that_are_not_those_of_the_rows(monkeypatch):
    positions = LagKVCache.kept_positions
    monkeypatch.setattr(LagKVCache, "kept_positions", lambda self, layer: positions(self, layer) - 1)
    with pytest.raises(checks.Different, match="names other positions than the operator"):
        checks.rows(subject("llama"))
    with pytest.raises(checks.Different, match="rows dropped against rows hidden"):
        checks.attention(subject("llama"))


@pytest.mark.parametrize("check", ["prompt", "chunks", "decoding", "generate"])
def test_a_cache_that_drops_rows_with_keep_ratio_1(monkeypatch, check):
    make = checks._cache

    def drops(subject, **settings):
        settings.pop("keep_ratio", None)
        return make(subject, **settings)

    monkeypatch.setattr(checks, "_cache", drops)
    if check == "prompt":  # attention of a step sees the rows that it drops
        assert checks.uncompressed_prompt(subject("llama")) is None
        return
    with pytest.raises(checks.Different):
        checks.CHECKS[check](subject("llama"))


@pytest.mark.parametrize("check", ["padding left", "padding right", "ratios", "static"])
def test_two_caches_that_keep_different_rows(monkeypatch, check):
    """Compressed caches are compared: padded against alone, several tokens against one, static against growing."""
    make, made = checks._cache, []

    def alternates(subject, **settings):
        made.append(settings)
        return make(subject, score=("std", "cosine")[len(made) % 2], **settings)

    monkeypatch.setattr(checks, "_cache", alternates)
    with pytest.raises(checks.Different, match="against"):
        checks.CHECKS[check](subject("llama"))


def test_a_check_that_sees_nothing_is_no_check(monkeypatch):
    monkeypatch.setattr(checks, "KEEP", checks.LAG_SIZE)
    with pytest.raises((checks.Different, RuntimeError), match=r"could not fail|was not replaced"):
        checks.attention(subject("llama"))


def test_what_a_check_raises_becomes_an_outcome(monkeypatch):
    def refused(subject):
        LagKVCache(subject.config, keep=0)

    def fails(subject):
        raise IndexError("gone")

    def nothing(subject):
        raise NothingToCompare("no padding")

    monkeypatch.setattr(checks, "CHECKS", {"a": lambda s: None, "b": refused, "c": fails, "d": nothing})
    verdict = judge(families.cases("llama")[0], ("sdpa",))
    assert verdict.status == DIFFERENT
    assert verdict.reason == "sdpa, c: IndexError in test_checks.py: gone"
    assert verdict.checks["sdpa"] == {
        "a": Outcome(EQUAL),
        "b": Outcome(REFUSED, "keep must be at least 1, got 0"),
        "c": Outcome(DIFFERENT, "IndexError in test_checks.py: gone"),
        "d": Outcome("nothing to compare", "no padding"),
    }
