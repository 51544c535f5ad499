"""Compression rolled out with care: a share of the requests, checked on real traffic, with a way back at any time."""

from __future__ import annotations

from lagkv_ext.rollout.status import RolloutStatus

__all__ = ["RolloutStatus"]
