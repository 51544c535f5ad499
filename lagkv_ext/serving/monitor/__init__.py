"""Live metrics of caches and rollouts for Prometheus, and the dashboard and alerts that go with them.

`CacheMonitor` and `RolloutCollector` need prometheus-client (``pip install 'lagkv_ext[monitoring]'``) and are imported
at their first use; ``lagkv monitor`` prints the dashboard and the alerts without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lagkv_ext.serving.monitor.metrics import CacheMonitor, MonitoredRequest
    from lagkv_ext.serving.monitor.rollout import RolloutCollector

__all__ = ["CacheMonitor", "MonitoredRequest", "RolloutCollector"]

_LAZY = {"CacheMonitor": "metrics", "MonitoredRequest": "metrics", "RolloutCollector": "rollout"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            import prometheus_client  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{name} needs prometheus-client, which is not installed here: pip install 'lagkv_ext[monitoring]'"
            ) from error
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
