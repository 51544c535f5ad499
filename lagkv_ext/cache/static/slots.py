"""Layers at fixed addresses: memory that is never replaced, and lengths on the device."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lagkv_ext.cache.growing.buffer import RowBuffer, checked_states, plain_tensors


class SlotLayer(CacheLayerMixin):
    """Keys and values in slots ``[B, H, capacity, D]``, of which the first ``length`` rows are held.

    A step of up to ``step_tokens`` tokens is the same work at the same addresses whatever is in the slots: it can be
    compiled or captured once. More tokens at once (a prompt) read the lengths on the host, so they cannot.
    """

    is_compileable = True
    is_croppable = False
    awaits_prompt = False  #: whether what comes next is a padded prompt, however short
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, step_tokens: int):
        super().__init__()
        self.capacity = capacity
        self.step_tokens = step_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states like these ``[B, H, any, D]``."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "LagKVStaticCache has no memory yet and would get it inside a compiled region, at no fixed address: "
                "give max_batch_size when making it, or run the prompt before compiling"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, heads = key_states.shape[:2]
        with plain_tensors():
            # Zeros, because attention multiplies what is behind the rows held by a weight of 0.
            self.keys, self.values = (
                x.new_zeros((self.batch_size, heads, self.capacity, x.shape[3]))
                for x in (key_states, value_states)
            )
            self.seen = self.keys.new_zeros((), dtype=torch.int64)
            self.allocate_lengths()
        for tensor in self._tensors():
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    @abstractmethod
    def allocate_lengths(self) -> None:
        """Make the tensors of `state`."""

    @abstractmethod
    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        """Contents beside keys, values and ``seen``: tensors by sequence ``[B, ...]``, and others."""

    @abstractmethod
    def step(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in up to ``step_tokens`` tokens without a look at the lengths; returns what attention sees."""

    @abstractmethod
    def take_in(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in any number of tokens; returns what attention sees."""

    # -- what transformers asks

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override] # as the static layers of transformers
        """Tokens seen, on the device; 0 before there is memory."""
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: no number of tokens is too many."""
        return -1

    @abstractmethod
    def get_query_offset(self) -> int | Tensor:
        """Positions of the new tokens, in whatever `get_mask_sizes` counts the columns of the mask."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in new tokens ``[B, H, n, D]``; returns the keys and values that attention of this step sees: for up
        to ``step_tokens`` tokens the slots, of which the mask shows the rows held.

        Raises:
            RuntimeError: states that require grad while gradients are recorded; more than ``step_tokens`` tokens in a
                compiled region.
            ValueError: states unlike those held (batch, heads, head dim, dtype, device).
        """
        key, value = checked_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        RowBuffer(self.keys, self.values).check_states(key, value)
        if key.shape[2] <= self.step_tokens and not self.awaits_prompt:
            return self.step(key, value)
        self.check_may_read()
        return self.take_in(key, value)

    def check_may_read(self) -> None:
        """RuntimeError in a compiled region, where lengths cannot be read."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"LagKVStaticCache takes at most step_tokens ({self.step_tokens}) tokens in one step of a compiled "
                "region: run longer prompts outside of it, or make the cache with a larger step_tokens"
            )

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        for tensor in self.storages():
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those of these indices, as many as there are; at the same addresses."""
        if self.is_initialized:
            for tensor in (self.keys, self.values, *self.state()[0]):
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    # -- what the cache asks beyond that

    def storages(self) -> list[Tensor]:
        """All that it holds; the addresses never change. Nothing while it is being allocated: a monitor's thread asks
        at any time."""
        return self._tensors() if self.is_initialized else []

    def _tensors(self) -> list[Tensor]:
        by_sequence, others = self.state()
        return [self.keys, self.values, self.seen, *by_sequence, *others]
