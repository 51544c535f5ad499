"""Rows of keys and values in buffers that grow: appending writes behind the last row and copies nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lagkv_ext import arguments


class RowBuffer:
    """``rows`` rows of keys ``[B, H, rows, Dk]`` and values ``[B, H, rows, Dv]`` in buffers with room for more.

    Starts out as the tensors given, without a copy: with no room, and not written to before the first growth.
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
        """Of keys and values together, over batch and heads."""
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


def check_new_states(key: Tensor, value: Tensor) -> None:
    """The checks that need no rows to compare with. RuntimeError for states that require grad, else ValueError."""
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
    if key.shape[:3] != value.shape[:3] or key.dtype != value.dtype or key.device != value.device:
        raise ValueError(
            f"key and value states must agree in [B, H, n], dtype and device, got {list(key.shape)} {key.dtype} on "
            f"{key.device} and {list(value.shape)} {value.dtype} on {value.device}"
        )


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
