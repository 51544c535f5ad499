"""Rows as small numbers with scales: symmetric, per token, over groups of channels. Plain PyTorch, every row by itself.

A row of a head is cut into groups of at most 32 channels; ``scale = max|x| / limit`` of the group, and a channel is
stored as ``x / scale`` in 8 bits, 4 bits (two to a byte) or float8 (e4m3). So rows can be moved, selected and joined
with their scales and never need to be quantised again.

Error of a channel, apart from one rounding in the dtype of the rows: ``scale / 2`` for int8 and int4, and
``max(|x| / 16, scale / 1024)`` for fp8. A group with a value that is not finite comes back as NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

FORMATS = ("int8", "int4", "fp8")
_LIMIT = {"int8": 127, "int4": 7, "fp8": 448}  # of the stored numbers
_GROUP = 32


@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """``n`` rows. ``codes``: uint8 ``[B, H, n, bytes]``. ``scale``: ``[B, H, n, groups]``, bfloat16 for rows of 16
    bits, else in the dtype of the rows."""

    form: str
    dim: int
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor

    @property
    def rows(self) -> int:
        return self.codes.shape[2]

    @property
    def storages(self) -> list[Tensor]:
        return [self.codes, self.scale]

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedRows:
        return dataclasses.replace(self, codes=change(self.codes), scale=change(self.scale))

    def joined(self, other: QuantizedRows) -> QuantizedRows:
        """These rows, then the others."""
        return dataclasses.replace(
            self,
            codes=torch.cat([self.codes, other.codes], dim=2),
            scale=torch.cat([self.scale, other.scale], dim=2),
        )

    def replaced(self, index: Tensor, by: Tensor, source: QuantizedRows) -> QuantizedRows:
        """Replaces row ``i`` by row ``index[..., i]`` of ``source`` where ``by`` (bool ``[B, H, n]``), bit for bit."""

        def pick(own: Tensor, theirs: Tensor) -> Tensor:
            rows = theirs.gather(2, index[..., None].expand(*index.shape, theirs.shape[3]))
            return torch.where(by[..., None], rows, own)

        return dataclasses.replace(
            self, codes=pick(self.codes, source.codes), scale=pick(self.scale, source.scale)
        )

    def dequantize(self) -> Tensor:
        """``[B, H, n, dim]`` in the dtype of the rows that were quantised."""
        if self.form == "int4":
            codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(-2)[..., : self.dim]
            numbers = codes.to(self.scale.dtype) - 8
        else:
            stored = torch.int8 if self.form == "int8" else torch.float8_e4m3fn
            numbers = self.codes.view(stored).to(self.scale.dtype)
        # In float32: a product of bfloat16 would round before the rows do.
        wide = numbers.to(_wide(self.dtype)).unflatten(-1, (self.scale.shape[3], -1))
        return (wide * self.scale[..., None].to(wide.dtype)).flatten(-2).to(self.dtype)


def quantize(x: Tensor, form: str) -> QuantizedRows:
    """``x [B, H, n, D]`` in float16, bfloat16, float32 or float64; ``form`` one of `FORMATS`."""
    limit, dim = _LIMIT[form], x.shape[3]
    groups = x.to(_wide(x.dtype)).unflatten(-1, (dim // group_size(dim), -1))
    most = groups.abs().amax(dim=-1)
    scale = torch.where(most.isfinite(), most / limit, torch.nan).to(scale_dtype(x.dtype))
    divisor = scale.to(groups.dtype)[..., None]
    numbers = torch.where(divisor > 0, groups / divisor, 0).clamp(-limit, limit).flatten(-2)
    if form == "fp8":
        codes = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    elif form == "int8":
        codes = numbers.round().to(torch.int8).view(torch.uint8)
    else:
        nibbles = pad(numbers.round().to(torch.int8) + 8, (0, dim % 2)).view(torch.uint8)
        codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return QuantizedRows(form, dim, x.dtype, codes, scale)


def group_size(dim: int) -> int:
    """Channels that share a scale: the largest divisor of the head dim up to 32."""
    return max(x for x in range(1, _GROUP + 1) if dim % x == 0)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    # bfloat16 because the scales of small float16 numbers would be float16 numbers without digits.
    return torch.bfloat16 if dtype.itemsize == 2 else dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
