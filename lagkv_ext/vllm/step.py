"""Turns a step's metadata into pieces and the compressions that they need (`plan.Pieces`).

`expand` serves any step. `DecodeBuffers.expand` serves steps in which every sequence computes at most one token, in the
same number of pieces as sequences: all that a layer's forward reads then lies at fixed addresses, so that a CUDA graph
of the forward can be captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lagkv_ext.vllm.compress import NULL_BLOCK, Work, on_device, work
from lagkv_ext.vllm.plan import crossings, pieces
from lagkv_ext.vllm.specs import LagKVRawSpec


class Tables:
    """Joins the builders of a layer's two cache groups in a step: the second completes the first's metadata."""

    def __init__(self) -> None:
        self._layers: frozenset[str] | None = None
        self._complete: Callable[[Tensor], None] | None = None
        self._compressed: Tensor | None = None

    def meet(self, layers: frozenset[str]) -> None:
        """RuntimeError where the second builder serves other layers than the first."""
        if self._layers not in (None, layers):
            raise RuntimeError(
                f"lagkv: vLLM grouped {sorted(layers)} and {sorted(self._layers or ())} in one of two cache groups; "
                "please report this"
            )
        self._layers = layers

    def give_raw(self, complete: Callable[[Tensor], None]) -> None:
        self._complete = complete
        self._finish()

    def give_compressed(self, table: Tensor) -> None:
        self._compressed = table
        self._finish()

    def _finish(self) -> None:
        if self._complete is not None and self._compressed is not None:
            complete, compressed = self._complete, self._compressed
            self._complete = self._compressed = None
            complete(compressed)


def expand(spec: LagKVRawSpec, common: Any, compressed: Tensor) -> tuple[Any, Work | None]:
    """``(metadata whose sequences are pieces, what to compress before)`` of a step's ``CommonAttentionMetadata``.

    ``compressed [B, *]`` is the second group's table.
    """
    plan, raw = spec.plan, common.block_table_tensor
    begins, ends = spans(common)
    due = compression(spec, raw, compressed, begins, ends)
    cut = pieces(plan, begins, ends)
    if not bool((plan.m(cut.k) > 0).any()):
        return common, due
    rows = cut.end - plan.m(cut.k) * (plan.lag - plan.keep)
    sizes, most = cut.end - cut.begin, int(rows.max())
    start = torch.zeros(len(cut.k) + 1, dtype=common.query_start_loc_cpu.dtype)
    start[1:] = sizes.cumsum(0)
    seq_lens, query_start_loc, sequence, k = on_device(
        raw.device, rows.to(common.seq_lens.dtype), start, cut.sequence, cut.k
    )
    width = -(-most // plan.block)
    table = raw.new_zeros((len(cut.k), raw.shape[1]))
    table[:, :width] = plan.shown(raw[sequence], compressed[sequence], k, width)
    prefilling = common.is_prefilling
    return (
        common.replace(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=start,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=rows.to(common.seq_lens_cpu_upper_bound.dtype),
            num_reqs=len(cut.k),
            max_query_len=int(sizes.max()),
            max_seq_len=most,
            block_table_tensor=table,
            is_prefilling=None if prefilling is None else prefilling[cut.sequence],
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        ),
        due,
    )


class DecodeBuffers:
    """Metadata of steps with one token for each sequence, in tensors that every step writes again.

    Compression is called in each of them: sequences that complete no boundary have ``before == after``, with which the
    operator touches nothing.
    """

    def __init__(self, spec: LagKVRawSpec, sequences: int, raw: Tensor, lengths: Tensor) -> None:
        """For up to ``sequences`` of them, with tables as ``raw [B, *]`` and lengths as ``lengths [B]``."""
        self._spec = spec
        self._table = raw.new_zeros((sequences, raw.shape[1]))
        self._target = raw.new_zeros((sequences, spec.plan.most_appended))
        self._before, self._after = raw.new_zeros((2, sequences))
        self._seq_lens = lengths.new_zeros(sequences)

    def expand(self, common: Any, compressed: Tensor) -> tuple[Any, Work]:
        """As `expand`. The caller's tables and ``query_start_loc`` are vLLM's own buffers and are passed on."""
        plan, raw, count = self._spec.plan, common.block_table_tensor, common.num_reqs
        begins, ends = spans(common)
        cut = pieces(plan, begins, ends)
        if len(cut.k) != count:
            raise RuntimeError(
                f"lagkv: {count} sequences of one token have {len(cut.k)} pieces; please report this"
            )
        done = ends // plan.boundary
        due = (begins < ends) & (ends % plan.boundary == 0) & (done >= plan.first)
        before, after = (torch.where(due, plan.m(k), 0) for k in (done - 1, done))
        rows = cut.end - plan.m(cut.k) * (plan.lag - plan.keep)
        numbers = torch.stack([rows, cut.k, plan.entries((done - 1).clamp_min(0)), before, after])
        (numbers,) = on_device(raw.device, numbers)
        seq_lens, table, target = self._seq_lens[:count], self._table[:count], self._target[:count]
        seq_lens.copy_(numbers[0])
        most = int(rows.max())
        width = -(-most // plan.block)
        table[:, :width] = plan.shown(raw, compressed, numbers[1], width)
        entry = numbers[2, :, None] + torch.arange(target.shape[1], device=raw.device)
        target.copy_(compressed.gather(1, entry.clamp_max(compressed.shape[1] - 1)))
        self._before[:count] = numbers[3]
        # As in `compress.work`: null blocks are a dummy run's.
        self._after[:count] = torch.where(target[:, 0] == NULL_BLOCK, numbers[3], numbers[4])
        return (
            common.replace(
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=rows.to(common.seq_lens_cpu_upper_bound.dtype),
                max_seq_len=most,
                block_table_tensor=table,
                req_idx=None,
                _num_computed_tokens_cache=None,
                _token_to_req_indices_cache=None,
            ),
            Work(raw, target, self._before[:count], self._after[:count], self._spec.settings),
        )


def spans(common: Any) -> tuple[Tensor, Tensor]:
    """First token and one past the last of each sequence of a step, int64 ``[B]`` on the CPU."""
    count = common.num_reqs
    ends = common.seq_lens_cpu_upper_bound[:count].long()
    return (ends - common.query_start_loc_cpu[: count + 1].long().diff()).clamp_min(0), ends


def compression(
    spec: LagKVRawSpec, raw: Tensor, compressed: Tensor, begins: Tensor, ends: Tensor
) -> Work | None:
    """Compressions that the step's tokens complete."""
    plan = spec.plan
    sequence, k = crossings(plan, begins, ends)
    if len(k) == 0:
        return None
    return work(plan, spec.settings, raw, compressed, sequence, k)
