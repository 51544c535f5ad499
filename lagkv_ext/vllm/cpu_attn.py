"""CPU_ATTN: how its block layouts are seen as rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from lagkv_ext.vllm.backend import LagKVBackend, LagKVBuilder, LagKVImpl


class LagKVCPUAttentionBuilder(LagKVBuilder, CPUAttentionMetadataBuilder):
    pass


class LagKVCPUAttentionImpl(LagKVImpl, CPUAttentionBackendImpl):
    def pools(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        # Per block and head first all keys, [channels, rows], then all values, [rows, channels].
        if layer.isa not in ("vec", "vec16"):
            raise NotImplementedError(
                f"lagkv does not know the layout of the CPU attention kernel {layer.isa!r}"
            )
        blocks, heads, rows, _ = kv_cache.shape
        halves = kv_cache.view(blocks, heads, 2, -1)
        key = halves[:, :, 0].view(blocks, heads, -1, rows).permute(0, 3, 1, 2)
        value = halves[:, :, 1].view(blocks, heads, rows, -1).transpose(1, 2)
        return key, value


class LagKVCPUAttentionBackend(LagKVBackend, CPUAttentionBackend):
    STOCK = CPUAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return LagKVCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return LagKVCPUAttentionBuilder
