"""FLASH_ATTN: keys and values of a token side by side in its head's row, ``[blocks, H, rows, Dk + Dv]``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from lagkv_ext.vllm.backend import LagKVBackend, LagKVBuilder, LagKVImpl, side_by_side


class LagKVFlashAttentionBuilder(LagKVBuilder, FlashAttentionMetadataBuilder):
    FULL_GRAPHS = True


class LagKVFlashAttentionImpl(LagKVImpl, FlashAttentionImpl):
    def pools(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return side_by_side(kv_cache, self.head_size)


class LagKVFlashAttentionBackend(LagKVBackend, FlashAttentionBackend):
    STOCK = FlashAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return LagKVFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return LagKVFlashAttentionBuilder
