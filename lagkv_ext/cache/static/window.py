"""A sliding-window layer at fixed addresses: the last tokens alone, moved up as new ones come."""

from __future__ import annotations

import torch
from torch import Tensor

from lagkv_ext.cache.static.slots import SlotLayer


class StaticWindowLayer(SlotLayer):
    """The ``window - 1`` tokens before a step, which its first token still sees, and room for the step.

    transformers' static sliding-window layer has a Python number for its length: torch compiles a step that reads it
    anew for every token, and a captured step would never see the window fill.
    """

    is_sliding = True

    def __init__(self, window: int, step_tokens: int):
        super().__init__(window - 1 + step_tokens, step_tokens)
        self.window = window

    def allocate_lengths(self) -> None:
        self.length = torch.zeros_like(self.seen)

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        return [], [self.length]

    def get_query_offset(self) -> int | Tensor:
        """Tokens seen: columns of the mask are positions, as in chunked attention they must be."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:  # type: ignore[override]
        """``(columns, position of the first)``."""
        if query_length <= self.step_tokens:
            if not self.is_initialized:
                return self.capacity, 0
            return self.capacity, self.seen - self.length + self._surplus(query_length)
        self.check_may_read()
        if not self.is_initialized:
            return query_length, 0
        rows = int(self.length)
        return rows + query_length, int(self.seen) - rows

    def step(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = key.shape[2]
        surplus = self._surplus(new)
        stay = (torch.arange(self.capacity, device=self.device) + surplus).clamp(max=self.capacity - 1)
        arrived = torch.arange(new, device=self.device) + self.length - surplus
        for slots, states in ((self.keys, key), (self.values, value)):
            slots.copy_(slots.index_select(2, stay))
            slots.index_copy_(2, arrived, states)
        self.length.add_(new - surplus)
        self.seen.add_(new)
        return self.keys, self.values

    def take_in(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new, rows = key.shape[2], int(self.length)
        if rows:
            key = torch.cat([self.keys[:, :, :rows], key], dim=2)
            value = torch.cat([self.values[:, :, :rows], value], dim=2)
        rows = min(rows + new, self.capacity)
        self.keys[:, :, :rows].copy_(key[:, :, -rows:])
        self.values[:, :, :rows].copy_(value[:, :, -rows:])
        self.length.fill_(rows)
        self.seen.add_(new)
        return key, value

    def _surplus(self, new: int) -> Tensor:
        """Rows that must go before so many fit."""
        return (self.length + new - self.capacity).clamp(min=0)
