"""The transformers that the caches need, checked before anything of it is used."""

from __future__ import annotations

import re

#: The oldest version that the caches are tested with, as in pyproject.toml.
OLDEST = "5.18"

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"LagKVCache needs transformers >= {OLDEST}, which is not installed here: pip install 'lagkv_ext[transformers]'"
    ) from error


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


if _numbers(transformers.__version__) < _numbers(OLDEST):
    raise ImportError(
        f"LagKVCache needs transformers >= {OLDEST}, got {transformers.__version__}: "
        "pip install --upgrade 'lagkv_ext[transformers]'"
    )
