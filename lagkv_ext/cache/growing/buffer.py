"""Buffers of keys and values that grow: appending writes behind the last row and copies nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lagkv_ext import arguments


class RowBuffer:
    """``rows`` rows of keys ``[B, H, rows, Dk]`` and values ``[B, H, rows, Dv]`` in buffers with room for more.

    Starts as the given tensors, without a copy. They have no room, so nothing is written to them.
    """

    def __init__(self, key: Tensor, value: Tensor):
        self._key = key
        self._value = value
        self._begin = 0
        self.rows: int = key.shape[2]

    @classmethod
    def empty(cls, key: Tensor, value: Tensor) -> RowBuffer:
        """No rows, for rows like these."""
        with plain_tensors():
            return cls(*(x.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (key, value)))

    @property
    def capacity(self) -> int:
        """Rows that there is room for, the rows held included."""
        return self._key.shape[2] - self._begin

    @property
    def key(self) -> Tensor:
        return self._key[:, :, self._begin : self._begin + self.rows]

    @property
    def value(self) -> Tensor:
        return self._value[:, :, self._begin : self._begin + self.rows]

    @property
    def storages(self) -> list[Tensor]:
        return [self._key, self._value]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of keys and values together, over batch and heads."""
        batch, heads, _, dim = self._key.shape
        return batch * heads * (dim + self._value.shape[3]) * self._key.element_size()

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write rows behind the last one; there must be room."""
        begin, end = self._begin + self.rows, self._begin + self.rows + key.shape[2]
        self._key[:, :, begin:end].copy_(key)
        self._value[:, :, begin:end].copy_(value)
        self.rows += key.shape[2]

    def drop_first(self, count: int) -> None:
        """Forget the first rows; their room comes back with the next `reallocate`."""
        self._begin += count
        self.rows -= count

    def reallocate(self, capacity: int) -> None:
        """Move the rows to buffers with room for ``capacity``; keys first, so that never both are there twice."""
        with plain_tensors():
            self._key = _copy_rows(self.key, capacity)
            self._value = _copy_rows(self.value, capacity)
            self._begin = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the buffers by ``change`` of them, the room behind the rows included."""
        with plain_tensors():
            self._key = change(self._key)
            self._value = change(self._value)

    def check_states(self, key: Tensor, value: Tensor) -> None:
        """ValueError unless these new rows are like the rows held in batch, heads, head dim, dtype and device."""
        for name, states, held in (("key", key, self._key), ("value", value, self._value)):
            for dim, what in ((0, "batch size"), (1, "number of heads"), (3, "head dim")):
                if states.shape[dim] != held.shape[dim]:
                    raise ValueError(
                        f"{name} states must agree with the cache in {what} ({held.shape[dim]}), got shape "
                        f"{list(states.shape)}"
                    )
            for what in ("dtype", "device"):
                if getattr(states, what) != getattr(held, what):
                    raise ValueError(
                        f"{name} states must have the {what} of the cache ({getattr(held, what)}), "
                        f"got {getattr(states, what)}"
                    )


def checked_states(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """New states that agree with each other. RuntimeError for states that require grad, else ValueError.

    Under autocast keys may come in float32 (rotary embeddings are computed in it) and values in 16 bits. Both are then
    held in the wider dtype, so keys as `DynamicCache` holds them; attention under autocast narrows both alike.
    """
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise RuntimeError(
            "LagKVCache keeps no gradient history (its buffers are written in place), got states that require "
            "grad: run the model under torch.no_grad() or torch.inference_mode(), as generate does"
        )
    for name, states in (("key", key), ("value", value)):
        if states.dim() != 4:
            raise ValueError(
                f"{name} states must have 4 dimensions [B, H, n, D], got shape {list(states.shape)}"
            )
        if states.dtype not in arguments.FLOATING:
            raise ValueError(
                f"{name} states must be float16, bfloat16, float32 or float64, got {states.dtype}"
            )
    if key.dtype != value.dtype and torch.is_autocast_enabled(key.device.type):
        dtype = torch.promote_types(key.dtype, value.dtype)
        key, value = key.to(dtype), value.to(dtype)
    if key.shape[:3] != value.shape[:3] or key.dtype != value.dtype or key.device != value.device:
        raise ValueError(
            f"key and value states must agree in [B, H, n], dtype and device, got {list(key.shape)} {key.dtype} on "
            f"{key.device} and {list(value.shape)} {value.dtype} on {value.device}"
        )
    return key, value


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradients, and plain tensors even under inference mode: a cache filled under ``inference_mode`` must stay
    writable for a ``generate`` under ``no_grad``."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _copy_rows(old: Tensor, capacity: int) -> Tensor:
    batch, heads, rows, dim = old.shape
    new = torch.empty((batch, heads, capacity, dim), dtype=old.dtype, device=old.device)
    new[:, :, :rows].copy_(old)
    return new
