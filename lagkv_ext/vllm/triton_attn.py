"""TRITON_ATTN: keys and values of a token side by side in its head's row, ``[blocks, H, rows, Dk + Dv]``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from lagkv_ext.vllm.backend import LagKVBackend, LagKVBuilder, LagKVImpl, side_by_side


class LagKVTritonAttentionBuilder(LagKVBuilder, TritonAttentionMetadataBuilder):
    FULL_GRAPHS = True


class LagKVTritonAttentionImpl(LagKVImpl, TritonAttentionImpl):
    def pools(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return side_by_side(kv_cache, self.head_size)


class LagKVTritonAttentionBackend(LagKVBackend, TritonAttentionBackend):
    STOCK = TritonAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return LagKVTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return LagKVTritonAttentionBuilder
