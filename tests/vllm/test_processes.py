"""Engines in processes of their own: vLLM without the setting, refusals at start, tensor parallelism, compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.cache import cache_tokens
from tests.vllm.engine import ENVIRONMENT
from tests.vllm.models import prompt

ROOT = Path(__file__).resolve().parents[2]
QUARTER = {"keep": 32}
PROMPTS = [prompt(n) for n in (40, 600)]


def run(
    model: Path, lagkv: Any, before: str = "", environment: dict[str, str] | None = None, **arguments: Any
):
    """Result of `run_engine`. A process that ends without an answer fails with its output."""
    environment = environment or {}
    told = {
        "model": str(model),
        "lagkv": lagkv,
        "before": before,
        "arguments": arguments,
        "prompts": PROMPTS,
        "new": 40,
        "inside": environment.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") == "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.run_engine", json.dumps(told)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(answers) == 1, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(answers[0].removeprefix("FOUND "))


@pytest.fixture(scope="module")
def expected(llama):
    return [cache_tokens(llama, tokens, 40, boundary=256, **QUARTER) for tokens in PROMPTS]


def test_without_the_setting_vllm_is_as_before_the_install(llama):
    arguments = {"num_gpu_blocks_override": None, "enable_prefix_caching": True}
    installed = run(llama, None, **arguments)
    absent = run(llama, None, environment={"VLLM_PLUGINS": ""}, **arguments)
    assert "error" not in absent, absent
    assert (installed.pop("plugins"), absent.pop("plugins")) == (True, False)
    assert installed == absent
    assert installed["managers"] == ["FullAttentionManager"]


def test_tensor_parallel_ranks_agree(llama, expected):
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    found = run(llama, QUARTER, environment=environment, tensor_parallel_size=2, max_num_batched_tokens=300)
    assert found.get("tokens") == expected, found


def test_compiled_by_inductor(llama, expected):
    found = run(llama, QUARTER, enforce_eager=False, max_num_batched_tokens=300)
    assert found.get("tokens") == expected, found


OTHER_PLUGIN = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
register_backend(AttentionBackendEnum.CPU_ATTN, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")
"""


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (OTHER_PLUGIN, ("CPU_ATTN", "another plugin stands in for it")),
        ("import vllm; vllm.__version__ = '0.99.1'", ("knows vLLM 0.32 and 0.33", "this is 0.99.1")),
        (
            "import sys; sys.modules['lagkv_ext'] = None",  # as where the compiled library is missing
            ("lagkv_ext cannot be imported",),
        ),
    ],
    ids=["two plugins", "unknown vLLM", "no library"],
)
def test_where_the_plugin_cannot_work_only_those_who_ask_for_it_are_refused(llama, before, words):
    refused = run(llama, QUARTER, before=before)
    assert "additional_config asks for lagkv" in refused["error"]
    assert all(word in refused["error"] for word in words), refused
    served = run(llama, None, before=before)
    assert len(served["tokens"][0]) == 40


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"keep_ration": 0.5}, {}, ("unknown name 'keep_ration'",)),
        ({"keep": 32}, {"block_size": 64}, ("block size (64) must divide keep", "--block-size (32 fits)")),
        ({"keep": 128}, {"block_size": 256}, ("block size must divide lag_size (128), got 256",)),
        ({"keep": 32}, {"kv_cache_dtype": "fp8"}, ("quantised KV cache",)),
        (
            {"keep": 32},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            ("speculative decoding",),
        ),
        ({"keep": 32}, {"disable_hybrid_kv_cache_manager": True}, ("--disable-hybrid-kv-cache-manager",)),
    ],
    ids=["unknown name", "keep", "lag", "fp8", "speculative", "one group"],
)
def test_what_does_not_fit_is_refused_at_start(llama, settings, arguments, words):
    found = run(llama, settings, **arguments)
    assert all(word in found.get("error", "") for word in words), found
