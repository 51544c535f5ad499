"""Machines of `vllm_simulation`: the seconds of a step by a roofline, and the blocks that fit.

Memory: weights, and rows of keys and values that attention reads, that new tokens write and that compression moves.
Products: two for each weight and token, four for each channel of a row that a token attends to. The slower of the two
bounds a stage. Tensor parallelism divides both and adds the sums after attention and after the MLP of every layer.
Pipeline parallelism gives a stage its share of the layers; a batch goes through the stages one after another, each of
which takes a batch at a time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Rows and tokens of a step, added up over its sequences."""

    tokens: int
    rows_read: int  #: rows that attention reads, those of a sequence once
    token_rows: int  #: rows that each token attends to
    rows_compressed: int  #: rows that compression reads


@dataclass(frozen=True)
class Machine:
    """A model on ``tp * pp`` H100 SXM: 3.35 TB/s and 989 TFLOP/s in bfloat16, of which kernels reach 0.8 and 0.6."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    parameters: float
    tp: int = 1
    pp: int = 1
    bytes_per_second: float = 3.35e12 * 0.8
    flops_per_second: float = 989e12 * 0.6
    link_bytes_per_second: float = 450e9
    memory: float = 80e9 * 0.9
    activations: float = 4e9
    stage_seconds: float = 0.002  #: scheduling, launches and sampling, in each stage

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys and values of a token in all layers."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2

    def blocks(self, block_size: int) -> int:
        """Every GPU holds an equal part of the weights and of each block."""
        free = self.tp * self.pp * (self.memory - self.activations) - 2 * self.parameters
        return int(free / (self.row_bytes * block_size))

    def seconds(self, batch: Batch) -> float:
        """Time of a batch in one of the ``pp`` stages."""
        rows = batch.rows_read + batch.tokens + 2 * batch.rows_compressed
        moved = 2 * self.parameters + self.row_bytes * rows
        attention = 4 * self.layers * self.heads * self.head_dim * batch.token_rows
        products = 2 * self.parameters * batch.tokens + attention
        bound = max(moved / self.bytes_per_second, products / self.flops_per_second) / (self.tp * self.pp)
        hidden_bytes = 2 * batch.tokens * self.hidden
        sums = 2 * self.layers / self.pp * (8e-6 + 2 * hidden_bytes / self.link_bytes_per_second)
        handover = 1e-5 + hidden_bytes / self.link_bytes_per_second
        return self.stage_seconds + bound + (self.tp > 1) * sums + (self.pp > 1) * handover


def llama_70b(name: str, tp: int, pp: int) -> Machine:
    return Machine(f"Llama 3.1 70B on {name}", 80, 8192, 64, 8, 128, 28672, 70.6e9, tp, pp)


MACHINES = {
    "8b": Machine("Llama 3.1 8B on one H100", 32, 4096, 32, 8, 128, 14336, 8.03e9),
    "70b": llama_70b("eight H100, TP 8", 8, 1),
    "70b-pp": llama_70b("eight H100, TP 4 x PP 2", 4, 2),
}
