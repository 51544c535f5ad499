"""LagKV: compression of key-value caches by lag-relative information (arXiv 2504.04704).

``import lagkv_ext`` needs torch alone: it loads the operators ``torch.ops.lagkv.*`` and offers documented functions
for them. ``LagKVCache`` needs transformers and is imported at its first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lagkv_ext._library import info
from lagkv_ext.blocks import compress_blocks
from lagkv_ext.ops import (
    Carried,
    Compressed,
    compact,
    compress,
    compress_,
    compress_carried,
    keep_count,
    lag_score,
    next_start,
    output_length,
    partition_bounds,
    topk_index,
)
from lagkv_ext.ragged import PackedCompressed, compress_paged_, compress_ragged_, compress_varlen
from lagkv_ext.settings_file import read_settings
from lagkv_ext.version import __version__

if TYPE_CHECKING:
    from lagkv_ext.cache import LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache

__all__ = [
    "Carried",
    "Compressed",
    "LagKVCache",
    "LagKVEncoderDecoderCache",
    "LagKVStaticCache",
    "PackedCompressed",
    "__version__",
    "cmake_prefix_path",
    "compact",
    "compress",
    "compress_",
    "compress_blocks",
    "compress_carried",
    "compress_paged_",
    "compress_ragged_",
    "compress_varlen",
    "info",
    "keep_count",
    "lag_score",
    "next_start",
    "output_length",
    "partition_bounds",
    "read_settings",
    "topk_index",
]

#: For CMake: ``find_package(lagkv_ext)`` finds the target ``lagkv::lagkv`` (C++) where this is in CMAKE_PREFIX_PATH.
cmake_prefix_path = str(Path(__file__).parent / "cmake")

_LAZY = dict.fromkeys(("LagKVCache", "LagKVEncoderDecoderCache", "LagKVStaticCache"), "lagkv_ext.cache")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
