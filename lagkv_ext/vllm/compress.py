"""Compresses, in every layer, the partitions that a step completes: one call of ``lagkv::compress_blocks``.

Its tables and numbers are computed once for a step and used by every layer. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lagkv_ext.vllm.plan import Plan
from lagkv_ext.vllm.settings import Settings

NULL_BLOCK = 0  #: `BlockPool.null_block` of vLLM, which no sequence owns


@dataclass(frozen=True)
class Work:
    """The compressions of a step: one row of the tables for each boundary that a sequence completes."""

    source: Tensor  #: ``[C, *]`` int32: raw blocks of the sequence
    target: Tensor  #: ``[C, *]`` int32: blocks that the boundary appends to the compressed table
    before: Tensor  #: ``[C]`` int32: partitions compressed so far
    after: Tensor  #: ``[C]`` int32: partitions compressed then
    settings: Settings

    def run(self, keys: Tensor, values: Tensor) -> None:
        """Compresses in one layer's pools, views as `lagkv_ext.compress_blocks` takes them."""
        settings = self.settings
        torch.ops.lagkv.compress_blocks(
            keys,
            values,
            self.source,
            self.target,
            self.before,
            self.after,
            settings.sink_size,
            settings.lag_size,
            settings.keep,
            value_weight=settings.value_weight,
            score=settings.score,
            smooth=settings.smooth,
        )


def work(
    plan: Plan, settings: Settings, raw: Tensor, compressed: Tensor, sequence: Tensor, k: Tensor
) -> Work:
    """The work of ``sequence [C]`` that complete the boundaries ``k [C]`` (on the CPU).

    ``raw [B, *]`` and ``compressed [B, *]`` are int32 block tables on the device.
    """
    first = plan.entries(k - 1)
    width = int((plan.entries(k) - first).max())
    # Behind what a shorter row appends lies anything: the operator does not look there.
    entry = (first[:, None] + torch.arange(width)).clamp_max(compressed.shape[1] - 1)
    numbers = torch.stack([plan.m(k - 1), plan.m(k)]).int()
    sequence, entry, numbers = on_device(raw.device, sequence, entry, numbers)
    target = compressed[sequence].gather(1, entry)
    before, after = numbers
    # Dummy runs of vLLM show tables of null blocks; a real boundary begins with a block of kept rows.
    after = torch.where(target[:, 0] == NULL_BLOCK, before, after)
    return Work(raw[sequence], target, before, after, settings)


def on_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """CPU tensors on the device, without waiting for it."""
    if device.type == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
