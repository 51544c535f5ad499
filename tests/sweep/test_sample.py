"""A sample of the sweep, a family of every kind: served and equal, or refused for what goes wrong without refusal."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch

from lagkv_ext.cache import models
from tests.sweep import families
from tests.sweep.verdict import EQUAL, REFUSED, judge

#: Families, and the attention implementation to try.
SERVED = {
    "llama": "sdpa",
    "gemma3_text": "sdpa",  # windows
    "gpt_neo": "eager",  # windows in layers with caches of all tokens
    "lfm2": "sdpa",  # convolutions
    "mllama": "sdpa",  # cross-attention
    "qwen2_moe": "eager",  # makes more masks than its layers use
    "xglm": "eager",  # compares the mask's shape with the keys'
    "zaya": "sdpa",  # linear and full attention in one layer
}
WITHOUT_SERVICE = {
    "mpt": "eager",  # ALiBi
    "doge": "sdpa",  # mixes heads
    "deepseek_v3": "sdpa",  # latents
    "xlnet": "eager",  # no cache
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", SERVED)
def test_what_is_served_is_equal(family):
    found = judge(families.cases(family)[0], (SERVED[family],))
    assert (found.status, found.reason) == (EQUAL, "")
    assert set(found.checks) == {SERVED[family]}
    assert EQUAL in {x.status for x in found.checks[SERVED[family]].values()}


@pytest.mark.parametrize("family", WITHOUT_SERVICE)
def test_what_is_refused_has_its_evidence(family):
    found = judge(families.cases(family)[0], (WITHOUT_SERVICE[family],))
    assert found.status == REFUSED
    assert found.reason
    assert found.evidence


@pytest.mark.parametrize("name", models.REFUSED)
def test_every_name_that_is_refused_is_a_family(name):
    assert name in families.families()
