"""Values of ``additional_config["lagkv"]``, and features of vLLM with which it is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from lagkv_ext.settings_file import NAMES as CACHE_NAMES
from lagkv_ext.vllm import settings
from lagkv_ext.vllm.settings import Settings, parse


def config(additional: Any = None, **changes: Any) -> SimpleNamespace:
    """Fields that `check_engine` reads of vLLM's configuration, with nothing in it that is refused."""
    parts = {
        "additional_config": {} if additional is None else additional,
        "speculative_config": None,
        "kv_transfer_config": None,
        "kv_events_config": None,
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        "cache_config": SimpleNamespace(kv_offloading_size=None, kv_sharing_fast_prefill=False),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "model_config": SimpleNamespace(is_mm_prefix_lm=False, rswa_window=None),
    }
    for name, value in changes.items():
        if isinstance(value, dict):
            parts[name] = SimpleNamespace(**{**vars(parts[name] or SimpleNamespace()), **value})
        else:
            parts[name] = value
    return SimpleNamespace(**parts)


@pytest.mark.parametrize("additional", [{}, {"other": 1}, {"lagkv": None}, {"lagkv": False}, object()])
def test_without_the_setting_there_is_nothing(additional):
    assert settings.settings_from(config(additional)) is None


def test_without_the_setting_nothing_is_refused():
    assert settings.settings_from(config({}, speculative_config=object())) is None


def test_defaults_are_those_of_the_cache():
    assert parse({}) == Settings(128, 32, 16, "std", 1.0, 1, 256)


@pytest.mark.parametrize(
    ("asked", "keep", "boundary"),
    [
        ({"keep_ratio": 0.5}, 64, 256),
        ({"keep": 128}, 128, 256),
        ({"lag_size": 512, "keep_ratio": 0.125}, 64, 512),
        ({"lag_size": 96}, 24, 288),
        ({"boundary": 1024}, 32, 1024),
    ],
)
def test_keep_and_boundary_follow(asked, keep, boundary):
    assert (parse(asked).keep, parse(asked).boundary) == (keep, boundary)


def test_a_settings_file_is_read(tmp_path):
    path = tmp_path / "lagkv.json"
    path.write_text(
        json.dumps(
            {"keep_ratio": 0.25, "lag_size": 64, "score": "cosine", "skip_layers": [], "max_tokens": None}
        )
    )
    assert settings.settings_from(config({"lagkv": str(path)})) == Settings(64, 16, 16, "cosine", 1.0, 1, 256)


def test_every_name_of_a_settings_file_is_known_here():
    assert set(CACHE_NAMES) <= set(settings.NAMES) | set(settings.NEUTRAL)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"keep_ration": 0.5}, ValueError, ("unknown name 'keep_ration'", "keep_ratio")),
        ({"keep_ratio": 0}, ValueError, ("keep_ratio", "(0, 1]", "got 0")),
        ({"keep_ratio": "half"}, ValueError, ("keep_ratio", "'half'")),
        ({"keep_ratio": 0.5, "keep": 3}, ValueError, ("keep or keep_ratio, not both",)),
        ({"keep": 129}, ValueError, ("at most lag_size (128)", "129")),
        ({"keep": 0}, ValueError, ("keep must be at least 1", "0")),
        ({"lag_size": True}, TypeError, ("lag_size must be an integer", "True")),
        ({"lag_size": 1.5}, TypeError, ("lag_size must be an integer", "1.5")),
        ({"sink_size": -1}, ValueError, ("sink_size must be at least 0", "-1")),
        ({"score": "best"}, ValueError, ("score must be 'std'", "'best'")),
        ({"value_weight": float("nan")}, ValueError, ("value_weight", "nan")),
        ({"smooth": 2}, ValueError, ("lagkv: smooth must be odd", "2")),
        ({"budget": "head"}, ValueError, ("budget to 'head'", "prefix cache", "Use budget 'partition'")),
        ({"boundary": 100}, ValueError, ("boundary must be a multiple of lag_size (128)", "100")),
        ({"max_tokens": 1000}, ValueError, ("max_tokens to 1000", "does not offer")),
        ({"skip_layers": [0]}, ValueError, ("skip_layers to [0]", "does not offer")),
        ({"quantization": "int8"}, ValueError, ("quantization", "'int8'")),
        (True, TypeError, ("an object of settings or the path", "True")),
        ([1], TypeError, ("an object of settings", "[1]")),
        ("/no/such/file", ValueError, ("/no/such/file", "cannot be read")),
    ],
)
def test_wrong_settings_are_named(asked, error, words):
    with pytest.raises(error) as caught:
        settings.settings_from(config({"lagkv": asked}))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "KV cache events"),
        ({"cache_config": {"kv_offloading_size": 4.0}}, "KV offloading"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "--kv-sharing-fast-prefill"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode context parallelism"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "prefill context parallelism"),
        ({"parallel_config": {"use_ubatching": True}}, "dual batch overlap"),
        (
            {"scheduler_config": {"disable_hybrid_kv_cache_manager": True}},
            "--disable-hybrid-kv-cache-manager",
        ),
        ({"model_config": {"is_mm_prefix_lm": True}}, "prefix-LM"),
        ({"model_config": {"rswa_window": 128}}, "sliding-window"),
    ],
)
def test_what_compression_would_break_is_refused_with_the_reason(changes, word):
    assert settings.settings_from(config({"lagkv": {}})) is not None
    with pytest.raises(ValueError, match="Leave one of the two out") as caught:
        settings.settings_from(config({"lagkv": {}}, **changes))
    assert word in str(caught.value)
