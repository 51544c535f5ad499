"""``LagKVCache``: LagKV as a cache for transformers models. The only part of the package that needs transformers."""

from __future__ import annotations

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "LagKVCache needs transformers >= 5, which is not installed here: pip install 'lagkv_ext[transformers]'"
    ) from error

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"LagKVCache needs transformers >= 5, got {transformers.__version__}: pip install 'lagkv_ext[transformers]'"
    )

from lagkv_ext.cache.growing.cache import LagKVCache
from lagkv_ext.cache.growing.encoder_decoder import LagKVEncoderDecoderCache
from lagkv_ext.cache.report import CacheReport, LayerReport
from lagkv_ext.cache.static.cache import LagKVStaticCache

__all__ = ["CacheReport", "LagKVCache", "LagKVEncoderDecoderCache", "LagKVStaticCache", "LayerReport"]
