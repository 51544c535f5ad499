"""The two cache groups that a full-attention layer has: raw rows by token, and compressed rows.

Both describe blocks of the same pool with the same page. `LagKVRawSpec` is no `FullAttentionSpec`: vLLM's coordinator
takes for granted that a shorter prefix of a full-attention hit is a hit, and raw tables have holes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from lagkv_ext.vllm.plan import Plan
from lagkv_ext.vllm.settings import Settings


@dataclass(frozen=True, kw_only=True)
class LagKVSpec(AttentionSpec):
    settings: Settings
    in_flight: int  #: tokens of one sequence that may be scheduled and not processed
    manager_block: int  #: rows of a block of the cache manager; ``block_size`` may be a kernel's, inside one

    @cached_property
    def plan(self) -> Plan:
        """The plan for the blocks of the cache manager."""
        return self.settings.plan(self.manager_block)

    # Larger: vLLM evens out the pages of different groups. Smaller: a kernel's blocks inside one of the manager.
    def copy_with_new_block_size(self, block_size: int) -> Any:
        changes: dict[str, Any] = {"block_size": block_size}
        return replace(self, **changes, manager_block=max(block_size, self.manager_block))


@dataclass(frozen=True, kw_only=True)
class LagKVRawSpec(LagKVSpec):
    """Rows by token; blocks of compressed partitions are given up."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return (
            self.plan.peak(vllm_config.model_config.max_model_len, self.in_flight)[0] * self.page_size_bytes
        )


@dataclass(frozen=True, kw_only=True)
class LagKVCompressedSpec(LagKVSpec):
    """Kept rows, append-only."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        blocks = self.plan.peak(vllm_config.model_config.max_model_len, self.in_flight)[1]
        return max(1, blocks) * self.page_size_bytes

    # As wide as stock: vLLM's slot mapping reads the table of every group at every position. Nothing is written there.
    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return max(
            super().max_num_blocks_per_req(vllm_config, max_len),
            self.plan.entries(max_len // self.plan.boundary),
        )


SpecT = TypeVar("SpecT", bound=LagKVSpec)


def spec_from(cls: type[SpecT], spec: AttentionSpec, settings: Settings, in_flight: int) -> SpecT:
    """``spec`` of a layer as ``cls``. ValueError where its blocks or its format do not fit the settings."""
    if spec.kv_quant_mode != KVQuantMode.NONE:
        raise ValueError(
            f"lagkv does not work with a quantised KV cache (--kv-cache-dtype), got {spec.kv_quant_mode.name}: rows "
            "would be scored without their scales. Use --kv-cache-dtype auto."
        )
    settings.plan(spec.block_size).check()
    stock = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
    return cls(**stock, settings=settings, in_flight=in_flight, manager_block=spec.block_size)
