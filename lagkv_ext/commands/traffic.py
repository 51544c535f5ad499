"""The shapes of one call of ``compress``, and the least bytes that any correct method can do with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lagkv_ext import formulas
from lagkv_ext.arguments import BUDGETS, SCORES

_INDEX_BYTES = 4


@dataclass(frozen=True)
class Problem:
    """One call of ``compress``: key ``[B, H, N, Dk]``, value ``[B, H, N, Dv]`` and parameters, as in docs/method.md."""

    heads: int
    tokens: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    start: int = 16
    lag_size: int = 128
    keep: int = 32
    value_weight: float = 1.0
    score: str = "std"
    smooth: int = 1
    budget: str = "partition"

    def __post_init__(self) -> None:
        for name in ("heads", "tokens", "key_dim", "value_dim", "batch", "lag_size", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.start < 0:
            raise ValueError(f"start must be at least 0, got {self.start}")
        if self.keep > self.lag_size:
            raise ValueError(f"keep must be at most lag_size ({self.lag_size}), got {self.keep}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}; got {self.score!r}")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth must be odd and at least 1, got {self.smooth}")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}; got {self.budget!r}")

    @property
    def partitions(self) -> int:
        return formulas.partition_count(self.tokens, self.start, self.lag_size)

    @property
    def compressed(self) -> int:
        """Partitions that lose tokens."""
        return formulas.compressed_count(self.tokens, self.start, self.lag_size)

    @property
    def rows(self) -> int:
        """Rows that stay, ``N'``."""
        return formulas.output_length(self.tokens, self.start, self.lag_size, self.keep)

    @property
    def scoring(self) -> dict:
        return {"value_weight": self.value_weight, "score": self.score, "smooth": self.smooth}

    @property
    def method(self) -> dict:
        """Options of the operators that compress."""
        return {**self.scoring, "budget": self.budget}

    @property
    def cache_bytes(self) -> int:
        """Keys and values together."""
        return self._rows(self.tokens)

    @property
    def output_bytes(self) -> int:
        """Keys, values and index of the result."""
        return self._rows(self.rows) + self._index(self.rows)

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random key and value like those of a model: every key channel has a mean of its own, well off zero."""
        generator = torch.Generator(device).manual_seed(seed)
        key = self._normal(self.key_dim, device, generator)
        offset = 3 * torch.randn(self.heads, 1, self.key_dim, generator=generator, device=device)
        key += offset.to(self.dtype)
        return key, self._normal(self.value_dim, device, generator)

    def least_bytes(self, operator: str) -> int:
        """Bytes read plus bytes written: every input byte that is needed once, every output byte once.

        ``operator``: one of the nine operators, where ``partition_bounds`` and ``compact`` stand for two calls, on
        key and on value, and the ragged ones have every slot or page full; or "copy": all of key and value read and
        written, which is what a clone costs.
        """
        if operator == "copy":
            return 2 * self.cache_bytes
        if operator == "compress":
            return self.cache_bytes + self.output_bytes
        if operator == "compress_":
            if self.compressed == 0:
                return self._index(self.rows)
            # Rows before start stay where they are.
            moved = self._rows(self.tokens - self.start) + self._rows(self.rows - self.start)
            return moved + self._index(self.rows)
        if operator == "compress_varlen":
            return self._rows(self.tokens) + self._rows(self.rows) + self._index(self.tokens)
        if operator in ("compress_ragged_", "compress_paged_"):  # the index is as long as the capacity
            moved = self.least_bytes("compress_") - self._index(self.rows)
            return moved + self._index(self.tokens)
        if operator == "partition_bounds":
            bounds = self.batch * self.heads * self.partitions * 2 * (self.key_dim + self.value_dim)
            return self._rows(self.partitions * self.lag_size) + bounds * self._real
        if operator == "lag_score":
            read = self._rows(self.partitions * self.lag_size) if self.compressed else 0
            return read + self._scores
        if operator == "topk_index":
            return self._scores + self._index(self.compressed * self.keep)
        if operator == "compact":
            return 2 * self._rows(self.rows) + 2 * self._index(self.rows)
        raise ValueError(f"unknown operator {operator!r}")

    @property
    def _real(self) -> int:
        return formulas.arithmetic_dtype(self.dtype).itemsize

    @property
    def _scores(self) -> int:
        return self.batch * self.heads * self.compressed * self.lag_size * self._real

    def _index(self, rows: int) -> int:
        return self.batch * self.heads * rows * _INDEX_BYTES

    def _rows(self, rows: int) -> int:
        return self.batch * self.heads * rows * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def _normal(self, dim: int, device: torch.device | str, generator: torch.Generator) -> Tensor:
        x = torch.empty(self.batch, self.heads, self.tokens, dim, dtype=self.dtype, device=device)
        for head in x.unbind(1):  # a head at a time: 16-bit values are rounded from a float32 copy
            head.copy_(torch.randn(head.shape, generator=generator, device=device))
        return x
