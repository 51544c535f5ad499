"""The keyword under which a model takes its cache: ``cache``, or ``past_key_values`` before transformers 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

_NEW, _OLD = "cache", "past_key_values"
_prepare = inspect.signature(GenerationMixin.prepare_inputs_for_generation)

#: The keyword of `generate` and of the models of the installed transformers.
CACHE = _NEW if _NEW in _prepare.parameters else _OLD


def cache_argument(cache: Any, model: Any = None) -> dict[str, Any]:
    """``cache`` as a keyword argument: ``model.generate(ids, **cache_argument(cache))``.

    With ``model``, for a call of it: a model whose file is not part of transformers may have the other keyword.
    """
    parameters = inspect.signature(model.forward).parameters if hasattr(model, "forward") else {}
    return {next((name for name in (_NEW, _OLD) if name in parameters), CACHE): cache}
