"""The entry point of lagkv_ext in vLLM (group ``vllm.general_plugins``).

Outside the package on purpose: vLLM logs a plugin that cannot be imported and serves without it. So this module imports
nothing of ``lagkv_ext`` before it is called. Where the plugin cannot work, a server that asks for ``lagkv`` does not
start, and one that does not ask for it starts as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_paths: dict[str, str] = {}  # stock class paths of the backends behind `refuse`
_reasons: dict[str, str] = {}


class LagKVRefused(ImportError):
    """``lagkv`` was asked for where it cannot work. An ImportError: vLLM looks on for another attention backend."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    try:
        from lagkv_ext.vllm.register import register as register_plugin
    except ImportError as error:
        reason = f"lagkv_ext cannot be imported: {error}"
        refuse(lambda name: reason)
    else:
        register_plugin()


def refuse(reason_for: Any) -> None:
    """Puts a check in front of every attention backend for which ``reason_for(its name)`` is a text and not None."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for backend in AttentionBackendEnum:
        reason = reason_for(backend.name)
        if reason is None or (not backend.is_overridden() and not backend.value):
            continue
        path = backend.get_path()
        if not path.startswith(f"{__name__}."):
            _paths[backend.name] = path
            register_backend(backend, f"{__name__}.{backend.name}")
        _reasons[backend.name] = reason


def __getattr__(name: str) -> Any:
    """vLLM's own class for the backend ``name``, unless the model that is being made asks for ``lagkv``."""
    if name not in _paths:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    additional = getattr(get_current_vllm_config_or_none(), "additional_config", None)
    if isinstance(additional, Mapping) and additional.get("lagkv") not in (None, False):
        raise LagKVRefused(
            f"additional_config asks for lagkv, which does not work with the attention backend {name} here: "
            f"{_reasons[name]}"
        )
    return resolve_obj_by_qualname(_paths[name])
