"""``LagKVCache``: LagKV as a cache for transformers models. The only part of the package that needs transformers."""

from __future__ import annotations

from lagkv_ext.cache.requirement import OLDEST  # isort: skip  (says what is missing, before the others fail)
from lagkv_ext.cache.growing.cache import LagKVCache
from lagkv_ext.cache.growing.encoder_decoder import LagKVEncoderDecoderCache
from lagkv_ext.cache.report import CacheReport, LayerReport
from lagkv_ext.cache.static.cache import LagKVStaticCache

__all__ = [
    "OLDEST",
    "CacheReport",
    "LagKVCache",
    "LagKVEncoderDecoderCache",
    "LagKVStaticCache",
    "LayerReport",
]
