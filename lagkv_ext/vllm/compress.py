"""Compresses, in every layer, the partitions that a step completes.

Their rows are gathered from raw blocks and compressed by ``lagkv::compress``; the kept rows are scattered to compressed
blocks. All addresses are computed once for a step and used by every layer. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lagkv_ext.vllm.plan import Plan
from lagkv_ext.vllm.settings import Settings


@dataclass(frozen=True)
class Rows:
    """Addresses in a pool: int64 ``[n, rows]`` each."""

    block: Tensor
    row: Tensor


@dataclass(frozen=True)
class Pool:
    """Keys or values of a layer's blocks, as a view ``[blocks, rows / span, span, H, *channels]`` of any strides."""

    view: Tensor

    def read(self, rows: Rows) -> Tensor:
        """``[n, H, rows, D]``, a copy."""
        return self.view[self._index(rows)].flatten(3).transpose(1, 2)

    def write(self, rows: Rows, values: Tensor) -> None:
        """Write ``values [n, H, rows, D]``."""
        self.view[self._index(rows)] = values.transpose(1, 2).unflatten(3, self.view.shape[4:])

    def _index(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor | int]:
        span = self.view.shape[2]
        return (rows.block, rows.row, 0) if span == 1 else (rows.block, rows.row // span, rows.row % span)


def plain_pool(rows: Tensor) -> Pool:
    """Pool of a view ``[blocks, rows, H, D]``."""
    return Pool(rows.unsqueeze(2))


@dataclass(frozen=True)
class Work:
    """The compressions of a step: sequences that compress as many partitions go together."""

    passes: tuple[tuple[Rows, Rows], ...]  #: (partitions and their last reference, kept rows)
    mixed: tuple[Rows, Rows] | None  #: (rest of the sink and first rows behind, mixed blocks)
    settings: Settings

    def run(self, keys: Pool, values: Pool) -> None:
        """Compresses in one layer's pools."""
        settings = self.settings
        for source, target in self.passes:
            key, value, _ = torch.ops.lagkv.compress(
                keys.read(source),
                values.read(source),
                0,
                settings.lag_size,
                settings.keep,
                value_weight=settings.value_weight,
                score=settings.score,
                smooth=settings.smooth,
            )
            rows = target.row.shape[1]
            keys.write(target, key[:, :, :rows])
            values.write(target, value[:, :, :rows])
        if self.mixed is not None:
            source, target = self.mixed
            for pool in (keys, values):
                pool.write(target, pool.read(source))


def work(
    plan: Plan,
    settings: Settings,
    raw: Tensor,
    compressed: Tensor,
    before: Tensor,
    k: Tensor,
    device: torch.device,
) -> Work:
    """The work of sequences that complete the boundaries ``k [C]``, with ``before [C]`` partitions compressed so far.

    ``raw [C, *]`` and ``compressed [C, *]`` are their block tables on the device; ``before`` and ``k`` are on the CPU.
    """
    passes = []
    counts = plan.m(k) - before
    for count in counts.unique().tolist():
        member = (counts == count).nonzero().flatten()
        member, first = on_device(device, member, before[member].unsqueeze(1))
        tokens = torch.arange((count + 1) * plan.lag, device=device)
        source = _rows(raw[member], plan.sink + first * plan.lag + tokens, plan.block)
        rows = torch.arange(count * plan.keep, device=device)
        entry = plan.kept_index(first * plan.kept_blocks + rows // plan.block)
        block = compressed[member].long().gather(1, entry)
        passes.append((source, Rows(block, (rows % plan.block).expand_as(block))))
    mixed = None
    if plan.part:
        (k,) = on_device(device, k.unsqueeze(1))
        rows = torch.arange(plan.block, device=device)
        behind = (plan.sink + plan.m(k) * plan.lag) // plan.block * plan.block
        source = _rows(raw, torch.where(rows < plan.part, plan.full * plan.block, behind) + rows, plan.block)
        block = compressed.long().gather(1, plan.mixed_index(k))
        mixed = source, Rows(block.expand(-1, plan.block), rows.expand(len(k), -1))
    return Work(tuple(passes), mixed, settings)


def on_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """CPU tensors on the device, without waiting for it."""
    if device.type == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def _rows(table: Tensor, tokens: Tensor, block: int) -> Rows:
    """Finds tokens ``[n, rows]`` in a raw block table ``[n, *]``."""
    return Rows(table.long().gather(1, tokens // block), tokens % block)
