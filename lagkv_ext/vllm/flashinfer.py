"""FLASHINFER: keys and values of a token side by side in its head's row, ``[blocks, H, rows, Dk + Dv]``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl, FlashInferMetadataBuilder

from lagkv_ext.vllm.backend import LagKVBackend, LagKVBuilder, LagKVImpl, side_by_side


class LagKVFlashInferBuilder(LagKVBuilder, FlashInferMetadataBuilder):
    pass


class LagKVFlashInferImpl(LagKVImpl, FlashInferImpl):
    def pools(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return side_by_side(kv_cache, self.head_size)


class LagKVFlashInferBackend(LagKVBackend, FlashInferBackend):
    STOCK = FlashInferBackend

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        return LagKVFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        return LagKVFlashInferBuilder
