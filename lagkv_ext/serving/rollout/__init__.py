"""Compression rolled out with care: a share of the requests, checked on real traffic, with a way back at any time.

    rollout = Rollout("lagkv-rollout.json", model.config)
    decision = rollout.cache(request_id=id, prompt_tokens=inputs.input_ids.shape[1])
    output = model.generate(**inputs, cache=decision.cache)

``lagkv rollout`` on the command line writes the file; ``docs/operations.md`` is the runbook.
"""

from __future__ import annotations

from lagkv_ext.serving.rollout.judge import Check, Judge
from lagkv_ext.serving.rollout.ladder import Ladder, Rung, read_ladder
from lagkv_ext.serving.rollout.policy import Guard, LadderRules, Policy, RolloutError, Samples, Variant
from lagkv_ext.serving.rollout.server import Decision, Rollout
from lagkv_ext.serving.rollout.status import RolloutStatus, VariantStatus
from lagkv_ext.serving.rollout.store import Store, Trip

__all__ = [
    "Check",
    "Decision",
    "Guard",
    "Judge",
    "Ladder",
    "LadderRules",
    "Policy",
    "Rollout",
    "RolloutError",
    "RolloutStatus",
    "Rung",
    "Samples",
    "Store",
    "Trip",
    "Variant",
    "VariantStatus",
    "read_ladder",
]
