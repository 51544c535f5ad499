"""CPU_ATTN: views of its block layouts. Per block and head first all keys, then all values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from lagkv_ext.vllm.backend import LagKVBackend, LagKVBuilder, LagKVImpl


def vector_pools(keys: Tensor, values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Keys ``[channels, rows]`` and values ``[rows, channels]``, of halves ``[blocks, H, rows * D]``."""
    key = keys.unflatten(2, (-1, rows)).permute(0, 3, 1, 2)
    return key, values.unflatten(2, (rows, -1)).transpose(1, 2)


def amx_pools(keys: Tensor, values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Tiles of 64 bytes a row in which two 16-bit channels (keys) or tokens (values) lie side by side.

    Keys ``[rows / 16, D / 2, 16 rows, 2 channels]``, values ``[D / 16, rows / 2, 16 channels, 2 rows]``.
    """
    channels = keys.shape[2] // rows
    key = keys.unflatten(2, (rows // 16, channels // 2, 16, 2)).permute(0, 2, 4, 1, 3, 5)
    value = values.unflatten(2, (channels // 16, rows // 2, 16, 2)).permute(0, 3, 5, 1, 2, 4)
    return key, value


LAYOUTS = {"vec": vector_pools, "vec16": vector_pools, "amx": amx_pools}


class LagKVCPUAttentionBuilder(LagKVBuilder, CPUAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._lagkv and self.isa not in LAYOUTS:
            raise ValueError(
                f"lagkv knows the block layouts {', '.join(LAYOUTS)} of vLLM's CPU attention, and this processor "
                f"uses {self.isa!r}"
            )


class LagKVCPUAttentionImpl(LagKVImpl, CPUAttentionBackendImpl):
    def pools(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = kv_cache.flatten(2).unflatten(2, (2, -1)).unbind(2)
        return LAYOUTS[layer.isa](keys, values, kv_cache.shape[2])


class LagKVCPUAttentionBackend(LagKVBackend, CPUAttentionBackend):
    STOCK = CPUAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return LagKVCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return LagKVCPUAttentionBuilder
