"""Tiny random models of any family, from the defaults of its configuration class, by rules on the names of fields."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import torch
from transformers import PreTrainedConfig

VOCABULARY = 101
#: Smaller than a partition, so that no query with a window would see a row that was dropped.
WINDOW = 6

#: Names of fields, and the largest size that a tiny model has there. The first match counts.
_SIZES = [
    (r"vocab", VOCABULARY),
    (r"window|attention_chunk_size", WINDOW),
    (r"^local_attention$", 2 * WINDOW),  # to both sides
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length)$", 512),
    (r"(head_dim|d_head|dim_head|kv_channels|head_size|rotary_dim)$", 8),
    (r"(kv_heads|kv_n_heads|key_value_heads|num_key_heads|mamba_n_?groups|n_groups)$", 2),
    (r"(heads|n_head)$", 4),
    (r"(experts_per_tok|moe_topk|moe_k|moe_top_k|top_k_experts)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"shared_experts$", 1),
    (r"experts$", 4),
    (r"(rank|state|state_size)$", 8),
    (r"(chunk_size|block_size)$", 8),
    (r"(size|_dim|d_model|n_embd|dff|dim_ff|n_inner|d_inner|width|d_ssm|size_per_layer_input)$", 32),
]  # fmt: skip
_LAYER_COUNTS = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers|depth|num_blocks)$"
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}  #: all others: 2
#: Lists with an entry for every layer. A tiny model has those of the layers that it repeats.
_PER_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "no_rope_layers",
    "activation_sparsity_pattern", "layer_rope_theta", "num_attention_heads_per_layer", "block_types",
)  # fmt: skip


class CannotBeMade(Exception):
    """Why there is no tiny model of a family."""


def tiny_config(cls: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """A tiny configuration with these fields changed; those of a part, as ``text_config``, by a dictionary."""
    try:
        return cls(**_merged(_arguments(cls, changes), changes))
    except Exception as error:
        raise CannotBeMade(f"its configuration: {_short(error)}") from error


def tiny_model(auto_class: Any, config: PreTrainedConfig, attention: str, dtype: torch.dtype) -> Any | None:
    """The same weights for every attention implementation and dtype; None where the family has no such attention."""
    torch.manual_seed(0)
    try:
        model = auto_class.from_config(copy.deepcopy(config), attn_implementation=attention)
    except Exception as error:
        if isinstance(error, ValueError) and re.search(
            "attn_implementation|attention implementation", str(error)
        ):
            return None
        raise CannotBeMade(_short(error)) from error
    if any(type(x).__name__.endswith("Experts") for x in model.modules()):
        model.set_experts_implementation("eager")  # the default has no kernel for float64
    _randomize(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@torch.no_grad()
def _randomize(model: Any) -> None:
    """Weights with which attention is far from uniform, so that every wrong row shows."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        elif re.search("embed|wte|shared", name):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * 1.3 / parameter.shape[-1] ** 0.5)


def _arguments(cls: type[PreTrainedConfig], changes: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        default = cls()
    except Exception:  # defaults that do not go together
        default = cls(**(changes or {}))
    own = {x.name for x in dataclasses.fields(cls)} - {x.name for x in dataclasses.fields(PreTrainedConfig)}
    values = {name: default.__dict__[name] for name in own if name in default.__dict__}
    picked = _picked_layers(default)
    arguments = {name: _tiny(name, value, len(picked) or 2) for name, value in values.items()}
    arguments = {name: value for name, value in arguments.items() if value != values[name]}
    for name, value in _per_layer(default).items():
        if name in own and picked:
            arguments[name] = [value[i] for i in picked]
    if values.get("num_key_value_heads") == values.get("num_attention_heads") != None:  # noqa: E711
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if "is_decoder" in own:
        arguments["is_decoder"] = True
    return arguments


def _tiny(name: str, value: Any, layers: int) -> Any:
    """The value of a field in a tiny configuration."""
    if isinstance(value, PreTrainedConfig):
        return {**_arguments(type(value)), "model_type": value.model_type}
    if name.endswith("_token_id"):
        return None if value is None else _TOKENS.get(name, 2)
    if "drop" in name and isinstance(value, float):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _LAYER_COUNTS.match(name):
        return layers
    return next((min(value, size) for pattern, size in _SIZES if re.search(pattern, name)), value)


def _picked_layers(default: PreTrainedConfig) -> list[int]:
    """Layers of the default configuration that the tiny one has: two of every kind, one where there are many."""
    lists = _per_layer(default)
    kinds: dict[str, list[int]] = {}
    for i in range(getattr(default, "num_hidden_layers", 0)):
        kinds.setdefault(str([x[i] for x in lists.values()]), []).append(i)
    of_each = 2 if len(kinds) < 4 else 1
    return sorted(i for layers in kinds.values() for i in layers[:of_each])


def _per_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    found = {name: getattr(config, name, None) for name in _PER_LAYER}
    return {
        name: list(value)
        for name, value in found.items()
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
    }


def _merged(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(arguments)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and "model_type" in (result.get(name) or {})
        result[name] = _merged(result[name], value) if is_part else value
    return result


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' * (len(text) > 160)}"
