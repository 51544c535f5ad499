"""The named shapes: one full-attention layer's cache of models that people run, at lengths that people use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from lagkv_ext.commands.traffic import Problem

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_T = TypeVar("_T")
DEVICES = ("cpu", "cuda")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
LINEARITY = (4096, 16384, 65536, 262144, 1048576)


@dataclass(frozen=True)
class ModelShape:
    """KV heads and head dim of a model's full-attention layers, and how many such layers it has."""

    name: str
    heads: int
    dim: int
    full_layers: int


# From the models' published configurations. Layers with a sliding window are not counted: LagKV leaves them alone.
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", heads=8, dim=128, full_layers=32),
        ModelShape("llama-3.1-70b", heads=8, dim=128, full_layers=80),
        ModelShape("llama-3.2-1b", heads=8, dim=64, full_layers=16),
        ModelShape("qwen2.5-7b", heads=4, dim=128, full_layers=28),
        ModelShape("qwen3-0.6b", heads=8, dim=128, full_layers=28),
        ModelShape("qwen3-32b", heads=8, dim=128, full_layers=64),
        ModelShape("mistral-7b-v0.3", heads=8, dim=128, full_layers=32),
        ModelShape("phi-4", heads=10, dim=128, full_layers=40),
        ModelShape("gemma-3-270m", heads=1, dim=256, full_layers=3),
        ModelShape("gemma-3-27b", heads=16, dim=128, full_layers=10),
        ModelShape("gpt-oss-20b", heads=8, dim=64, full_layers=12),
    )
}


class UnknownName(ValueError):
    """A name that is not known; the message lists those that are."""


def lookup(kind: str, name: str, known: Mapping[str, _T]) -> _T:
    """``known[name]``, or `UnknownName` with the list of what there is."""
    if name not in known:
        raise UnknownName(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return known[name]


def parse_tokens(text: str) -> int:
    """``4096``, ``4k`` or ``1m``: a number of tokens, k and m in powers of 1024."""
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdigit() or int(digits) == 0:
        raise ValueError(f"a number of tokens is like 4096, 32k or 1m, got {text!r}")
    return int(digits) * factor


def tokens_text(tokens: int) -> str:
    for unit, factor in (("m", 1024**2), ("k", 1024)):
        if tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return str(tokens)


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    shape: ModelShape
    problem: Problem
    device: str
    threads: int  # 0 on CUDA

    @property
    def dtype(self) -> str:
        return str(self.problem.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Names the case in tables and JSON files; two cases that differ have different names."""
        p = self.problem
        where = self.device if self.device != "cpu" else f"cpu x{self.threads}"
        batch = f" batch {p.batch}" if p.batch != 1 else ""
        return (
            f"{self.shape.name} {tokens_text(p.tokens)} {self.dtype} {where}{batch} "
            f"L={p.lag_size} keep={p.keep} start={p.start} {p.score}"
        )

    def need_bytes(self) -> int:
        """Memory of the buffers: pristine, working and copied-to cache, and the largest result (a clone)."""
        return 4 * self.problem.cache_bytes + self.problem.output_bytes

    def eager_bytes(self) -> int:
        """Temporaries of the reference on top: five tensors of the arithmetic's type, each as large as the keys."""
        p = self.problem
        real = 8 if p.dtype == torch.float64 else 4
        return 5 * p.batch * p.heads * p.tokens * max(p.key_dim, p.value_dim) * real
