"""Settings of the plugin: ``additional_config["lagkv"]`` of vLLM, and what of vLLM it cannot serve with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lagkv_ext import arguments, ops
from lagkv_ext.arguments import SCORES
from lagkv_ext.settings_file import read_settings
from lagkv_ext.vllm.plan import Plan

KEY = "lagkv"
#: The names of `LagKVCache` that mean the same here.
NAMES = ("lag_size", "keep_ratio", "keep", "sink_size", "score", "value_weight", "smooth", "boundary")
#: Further names of `LagKVCache`, which a settings file may hold, and the values that change nothing here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "order": (None, "use_then_compress"),
    "budget": ("partition",),
    "layer_keep_ratio": (None, {}),
    "skip_layers": (None, [], ()),
    "max_tokens": (None,),
    "quantization": (None,),
    "offloading": (None, False),
    "offload_only_non_sliding": (None, False, True),
}
LEAST_BOUNDARY = 256


@dataclass(frozen=True)
class Settings:
    """Settings of the full-attention layers of a model."""

    lag_size: int
    keep: int
    sink_size: int
    score: str
    value_weight: float
    smooth: int
    boundary: int  #: tokens; the cache changes only where the tokens seen are a multiple of it

    def plan(self, block_size: int) -> Plan:
        return Plan(self.sink_size, self.lag_size, self.keep, block_size, self.boundary)


def settings_from(vllm_config: Any) -> Settings | None:
    """The settings in vLLM's configuration, None where ``lagkv`` is absent, null or false.

    Raises ValueError or TypeError: they are wrong, or vLLM is configured for what the plugin cannot serve.
    """
    asked = asked_for(vllm_config)
    if asked is None:
        return None
    check_engine(vllm_config)
    return parse(asked)


def asked_for(vllm_config: Any) -> Any:
    """Reads ``additional_config`` under ``lagkv``, None where compression is not asked for."""
    additional = getattr(vllm_config, "additional_config", None)
    asked = additional.get(KEY) if isinstance(additional, Mapping) else None
    return None if asked is False else asked


def parse(asked: Any) -> Settings:
    """Settings from a mapping, or from the file that a string names."""
    if isinstance(asked, str):
        source = f"the settings file {asked}"
        asked = read_settings(asked)
    else:
        source = f"additional_config[{KEY!r}]"
    if not isinstance(asked, Mapping):
        raise TypeError(
            f"lagkv: {source} must be an object of settings or the path of a settings file, got {asked!r}"
        )
    values = dict(asked)
    if values.get("budget") == "head":
        raise ValueError(
            f"lagkv: {source} sets budget to 'head', with which rows kept before are dropped again as a sequence "
            "grows: blocks that other requests share through the prefix cache would change. Use budget 'partition'"
        )
    for name, neutral in NEUTRAL.items():
        if name in values and (value := values.pop(name)) not in neutral:
            raise ValueError(
                f"lagkv: {source} sets {name} to {value!r}, which the vLLM plugin does not offer; leave it out"
            )
    if unknown := [name for name in values if name not in NAMES]:
        raise ValueError(f"lagkv: {source} has the unknown name {unknown[0]!r}; known: {', '.join(NAMES)}")
    lag_size = _integer("lag_size", values.get("lag_size", 128), 1)
    keep = _keep(values.get("keep"), values.get("keep_ratio"), lag_size)
    sink_size = _integer("sink_size", values.get("sink_size", 16), 0)
    score = values.get("score", "std")
    if score not in SCORES:
        raise ValueError(f"lagkv: score must be {' or '.join(map(repr, SCORES))}, got {score!r}")
    weight = values.get("value_weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"lagkv: value_weight must be a finite number, got {weight!r}")
    smooth = arguments.smoothing("lagkv: smooth", values.get("smooth", 1))
    boundary = values.get("boundary")
    if boundary is None:
        boundary = -(-LEAST_BOUNDARY // lag_size) * lag_size
    settings = Settings(
        lag_size, keep, sink_size, score, float(weight), smooth, _integer("boundary", boundary, 1)
    )
    settings.plan(1).check()
    return settings


def check_engine(vllm_config: Any) -> None:
    """ValueError with the reason where vLLM is asked for something that compression would break."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    events = vllm_config.kv_events_config
    refused = {
        "speculative decoding: rejected tokens would have to be taken back out of compressed rows": (
            vllm_config.speculative_config is not None
        ),
        "KV connectors (--kv-transfer-config): they move blocks by token, and compressed blocks have none": (
            vllm_config.kv_transfer_config is not None
        ),
        "KV offloading (--kv-offloading-size): it moves blocks by token, and compressed blocks have none": (
            getattr(cache, "kv_offloading_size", None) is not None
        ),
        "KV cache events: compressed blocks have no tokens to announce": (
            events is not None and bool(events.enable_kv_cache_events)
        ),
        "decode context parallelism: a partition's rows would lie on several ranks": (
            parallel.decode_context_parallel_size > 1
        ),
        "prefill context parallelism: a partition's rows would lie on several ranks": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "dual batch overlap (--enable-dbo): the halves of a step are built one at a time": (
            bool(getattr(parallel, "use_ubatching", False))
        ),
        "--disable-hybrid-kv-cache-manager: compressed rows need a cache group of their own": (
            bool(scheduler.disable_hybrid_kv_cache_manager)
        ),
        "prefix-LM models: their attention ranges are given by position, and rows are no positions": (
            bool(getattr(model, "is_mm_prefix_lm", False))
        ),
        "reference sliding-window attention: it masks by position, and rows are no positions": (
            getattr(model, "rswa_window", None) is not None
        ),
        "--kv-sharing-fast-prefill: it attends without the plugin's block tables": (
            bool(getattr(cache, "kv_sharing_fast_prefill", False))
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"lagkv does not work with {reason}. Leave one of the two out.")


def _keep(keep: Any, keep_ratio: Any, lag_size: int) -> int:
    if keep is not None and keep_ratio is not None:
        raise ValueError(
            f"lagkv: give keep or keep_ratio, not both; got keep={keep!r} and keep_ratio={keep_ratio!r}"
        )
    if keep is not None:
        if (keep := _integer("keep", keep, 1)) > lag_size:
            raise ValueError(f"lagkv: keep must be at most lag_size ({lag_size}), got {keep}")
        return keep
    ratio = ops.DEFAULT_KEEP_RATIO if keep_ratio is None else keep_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"lagkv: keep_ratio must be a number in (0, 1], got {ratio!r}")
    return ops.keep_count(ratio, lag_size)


def _integer(name: str, value: Any, minimum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"lagkv: {name} must be an integer, got {value!r}")
    if number < minimum:
        raise ValueError(f"lagkv: {name} must be at least {minimum}, got {number}")
    return number
