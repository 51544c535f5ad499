"""LagKV in plain PyTorch: the semantics of record, against which every kernel is tested.

Written to be read next to the paper (arXiv 2504.04704, section 3), not to be fast. Every function has the signature
and the result of the operator of the same name in ``torch.ops.lagkv``. Shapes: ``B`` batch, ``H`` KV heads, ``N``
tokens, ``D`` head dim, ``P`` partitions of ``L = lag_size`` tokens.

Rules of ``score="blend"``, ``smooth`` and ``budget="head"`` that the formulas alone do not say:

- NaN. A NaN or an infinity in a row makes the std score, and so the blend, of its whole partition NaN; one in the
  reference partition does the same to the partition before it. Smoothing is plain arithmetic on that. NaN ranks highest
  in every selection, also among carried scores.
- Signed zeros are equal. Among equal scores the lower row wins, also between partitions, and rows kept before stand
  before new ones.
- ``D == 1``: ``softmax(s) = 1 / L``, and the cosine is the product of two signs. ``L == 1``: ``L softmax(s) = 1``. The
  blend is not standardised, so it ranks by direction in both cases.
- A score is final once it is computed: it depends on its own partition and the next one alone, and is smoothed within
  its partition before it competes. Carried scores are not smoothed again.
- ``budget`` changes neither the output length nor the next ``start``, which is ``start + keep (P - 1)``. The index is
  ascending. The sink, the last full partition and the remainder never compete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lagkv_ext import formulas


def partition_bounds(x: Tensor, start: int, lag_size: int) -> Tensor:
    """Per-channel minimum and maximum of every full partition: ``[B, H, P, 2, D]``."""
    tiles = _partitions(x, start, lag_size)  # [B, H, P, L, D]
    return torch.stack([tiles.amin(dim=3), tiles.amax(dim=3)], dim=3)


def lag_score(
    key: Tensor,
    value: Tensor,
    start: int,
    lag_size: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
) -> Tensor:
    """Score of every token of the partitions ``0 .. P-2``: ``[B, H, P-1, L]`` (empty where ``P < 2``)."""
    if formulas.compressed_count(key.shape[2], start, lag_size) == 0:
        return key.new_empty((*key.shape[:2], 0, lag_size), dtype=formulas.arithmetic_dtype(key.dtype))
    one = {"std": _std_score, "cosine": _cosine_score, "blend": _blend_score}[score]
    total = one(_partitions(key, start, lag_size)) + value_weight * one(_partitions(value, start, lag_size))
    return smoothed(total, smooth)


def smoothed(score: Tensor, smooth: int) -> Tensor:
    """Mean of ``score [..., L]`` over ``smooth`` (odd) tokens around each one, as far as they lie in its partition."""
    length = score.shape[-1]
    half = min(smooth // 2, length - 1)
    if half <= 0:
        return score
    total, count = torch.zeros_like(score), torch.zeros_like(score)
    for offset in range(-half, half + 1):  # terms are added in ascending position
        here = slice(max(0, -offset), length - max(0, offset))
        total[..., here] += score[..., max(0, offset) : length + min(0, offset)]
        count[..., here] += 1
    return total / count


def topk_index(score: Tensor, keep: int) -> Tensor:
    """Positions of the ``keep`` highest scores, ascending, int32. Ties: lower position first; NaN is highest."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values.to(torch.int32)


def head_index(score: Tensor, carried: Tensor, start: int, keep: int, length: int) -> tuple[Tensor, Tensor]:
    """``budget="head"``: ``index [B, H, N']`` int32, ascending, and the scores of the rows that competed and were kept.

    ``score [B, H, P-1, L]`` is of the partitions after ``start``, ``carried [B, H, C]`` of the ``C`` rows before
    ``start`` that earlier compressions kept; the first ``start - C`` rows are the sink. The ``C + (P-1) L`` rows after
    the sink compete for ``C + keep (P-1)`` places. The second result, of that many columns, is the next ``carried``.
    """
    compressed, lag_size = score.shape[2:]
    sink, window = start - carried.shape[2], start + compressed * lag_size
    position = torch.arange(length, dtype=torch.int32, device=score.device).expand(*score.shape[:2], length)
    if compressed == 0:
        return position.clone(), carried
    rivals = torch.cat([carried, score.flatten(2)], dim=2)
    chosen = topk_index(rivals, carried.shape[2] + keep * compressed)
    index = torch.cat([position[:, :, :sink], chosen + sink, position[:, :, window:]], dim=2)
    return index, rivals.gather(2, chosen.long())


def compact(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [B, H, N, D]`` at the positions ``index [B, H, K]``: ``[B, H, K, D]``."""
    # Not torch.gather: on the CPU that rewrites the bits of a bfloat16 NaN.
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    head = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[batch, head, index.long()]


def compress(
    key: Tensor,
    value: Tensor,
    start: int,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole method: ``(key [B, H, N', Dk], value [B, H, N', Dv], index [B, H, N'])``.

    The gradient of key and value goes back to the rows that were kept; the choice of rows has none.
    """
    scoring: dict[str, Any] = {"value_weight": value_weight, "score": score, "smooth": smooth}
    if budget == "head":
        none = key.new_empty((*key.shape[:2], 0), dtype=formulas.arithmetic_dtype(key.dtype))
        return compress_carried(key, value, none, start, lag_size, keep, **scoring)[:3]
    scores = lag_score(key.detach(), value.detach(), start, lag_size, **scoring)
    index = _kept_index(topk_index(scores, keep), key.shape[2], start, lag_size)
    return compact(key, index), compact(value, index), index


def compress_carried(
    key: Tensor,
    value: Tensor,
    carried: Tensor,
    start: int,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compress` with ``budget="head"`` of a cache whose rows before ``start`` bring their scores (see `head_index`).

    ``carried [B, H, C]`` is float32, or float64 for float64 rows. The fourth result is the next ``carried``.
    """
    scoring: dict[str, Any] = {"value_weight": value_weight, "score": score, "smooth": smooth}
    scores = lag_score(key.detach(), value.detach(), start, lag_size, **scoring)
    index, carried = head_index(scores, carried, start, keep, key.shape[2])
    return compact(key, index), compact(value, index), index, carried


def compress_(
    key: Tensor,
    value: Tensor,
    start: int,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
    scores: Tensor | None = None,
    sink_size: int = 0,
) -> Tensor:
    """`compress` into the first ``N'`` rows of ``key`` and ``value``; returns the index.

    ``scores [B, H, N]`` goes with the rows (``budget="head"`` alone): the rows ``sink_size .. start - 1`` bring their
    scores in it, and after the call the rows ``sink_size .. new start - 1`` have theirs. The rest of it is unused.
    """
    scoring: dict[str, Any] = {"value_weight": value_weight, "score": score, "smooth": smooth}
    carried = None if scores is None else scores[:, :, sink_size:start]
    new_key, new_value, index, carried = _compress(
        key, value, carried, start, lag_size, keep, budget, scoring
    )
    key[:, :, : index.shape[2]] = new_key
    value[:, :, : index.shape[2]] = new_value
    if scores is not None and carried is not None:
        scores[:, :, sink_size : sink_size + carried.shape[2]] = carried
    return index


def compress_ragged_(
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
    scores: Tensor | None = None,
    sink_size: int = 0,
) -> Tensor:
    """`compress_` of every slot: sequence ``b`` is the first ``length[b]`` rows of ``key[b]`` and ``value[b]``.

    ``scores [B, H, capacity]`` goes with the rows. Of a sequence whose start is below ``sink_size``, no row brings one.
    """
    scoring: dict[str, Any] = {"value_weight": value_weight, "score": score, "smooth": smooth}
    index = key.new_full(key.shape[:3], -1, dtype=torch.int32)
    for b, tokens in enumerate(length.tolist()):
        sequence = key[b : b + 1, :, :tokens], value[b : b + 1, :, :tokens]
        first = int(start[b])
        sink = min(sink_size, first)
        carried = None if scores is None else scores[b : b + 1, :, sink:first]
        new_key, new_value, kept, carried = _compress(
            *sequence, carried, first, lag_size, keep, budget, scoring
        )
        compressed = formulas.compressed_count(tokens, first, lag_size)
        rows, new_start = kept.shape[2], first + keep * compressed
        key[b, :, :rows], value[b, :, :rows], index[b, :, :rows] = new_key[0], new_value[0], kept[0]
        if scores is not None and carried is not None and compressed:
            scores[b, :, sink:new_start] = carried[0]
        start[b], length[b] = new_start, rows
    return index


def compress_varlen(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    start: Tensor,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`compress` of packed rows: sequence ``b`` is ``key[cu_seqlens[b] : cu_seqlens[b + 1]]``, and so is the result.

    ``(key [T, H, Dk], value [T, H, Dv], index [H, T], cu_seqlens [B + 1], start [B])``; rows from the new
    ``cu_seqlens[-1]`` on are zero here and unspecified elsewhere.
    """
    scoring: dict[str, Any] = {
        "value_weight": value_weight,
        "score": score,
        "smooth": smooth,
        "budget": budget,
    }
    lengths = cu_seqlens.diff()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    kept: list[Tensor] = []
    new_cu_seqlens, new_start = cu_seqlens.clone(), start.clone()
    for b in range(start.shape[0]):
        rows = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        sequence = key[rows].transpose(0, 1)[None], value[rows].transpose(0, 1)[None]
        one = compress(*sequence, int(start[b]), lag_size, keep, **scoring)
        for results, result in zip((keys, values, kept), one, strict=True):
            results.append(result[0])
        new_start[b] = formulas.next_start(int(lengths[b]), int(start[b]), lag_size, keep)
        new_cu_seqlens[b + 1] = new_cu_seqlens[b] + one[2].shape[2]
    heads, spare = key.shape[1], key.shape[0] - int(new_cu_seqlens[-1])
    new_key, new_value = (
        torch.cat([*rows, x.new_zeros(heads, spare, x.shape[2])], dim=1).transpose(0, 1).contiguous()
        for x, rows in ((key, keys), (value, values))
    )
    index = torch.cat([*kept, key.new_full((heads, spare), -1, dtype=torch.int32)], dim=1)
    return new_key, new_value, index, new_cu_seqlens, new_start


def compress_paged_(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    start: Tensor,
    length: Tensor,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
    budget: str = "partition",
    scores: Tensor | None = None,
    sink_size: int = 0,
) -> Tensor:
    """`compress_ragged_` of pages: token ``i`` of sequence ``b`` is row ``i % block_size`` of block
    ``block_table[b, i // block_size]`` of the pools ``[blocks, block_size, H, D]`` and of ``scores [blocks, block_size,
    H]``.
    """
    scoring: dict[str, Any] = {"value_weight": value_weight, "score": score, "smooth": smooth}
    block_size, heads = key_cache.shape[1:3]
    capacity = block_table.shape[1] * block_size
    index = key_cache.new_full((block_table.shape[0], heads, capacity), -1, dtype=torch.int32)
    for b, tokens in enumerate(length.tolist()):
        position = torch.arange(tokens, device=key_cache.device)
        block, row = block_table[b, position // block_size].long(), position % block_size
        sequence = key_cache[block, row].transpose(0, 1)[None], value_cache[block, row].transpose(0, 1)[None]
        first = int(start[b])
        sink = min(sink_size, first)
        carried = None if scores is None else scores[block, row].T[None, :, sink:first]
        new_key, new_value, kept, carried = _compress(
            *sequence, carried, first, lag_size, keep, budget, scoring
        )
        compressed = formulas.compressed_count(tokens, first, lag_size)
        rows, new_start = kept.shape[2], first + keep * compressed
        if compressed:
            moved = position[(first if scores is None else sink) : rows]
            key_cache[block[moved], row[moved]] = new_key[0, :, moved].transpose(0, 1)
            value_cache[block[moved], row[moved]] = new_value[0, :, moved].transpose(0, 1)
            if scores is not None and carried is not None:
                moved = position[sink:new_start]
                scores[block[moved], row[moved]] = carried[0].T
        index[b, :, :rows] = kept[0]
        start[b], length[b] = new_start, rows
    return index


def compress_blocks(
    key_cache: Tensor,
    value_cache: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    m_before: Tensor,
    m_after: Tensor,
    sink_size: int,
    lag_size: int,
    keep: int,
    *,
    value_weight: float = 1.0,
    score: str = "std",
    smooth: int = 1,
) -> Tensor:
    """Kept rows of the partitions ``m_before[b] .. m_after[b] - 1`` of sequence ``b``, from its source blocks to its
    target blocks of the same pools (see `block_rows`); returns the token of every target row.

    Partition ``p`` begins at token ``sink_size + p * lag_size``. Behind the kept rows, where the sink ends inside a
    block, lies the mixed block: the sink's rows in that block, then the tokens behind the last compressed partition.
    """
    (block_size, heads), batch = _pool_sizes(key_cache), source_table.shape[0]
    index = torch.full(
        (batch, heads, target_table.shape[1] * block_size), -1, dtype=torch.int32, device=key_cache.device
    )
    part = sink_size % block_size
    for b, (before, after) in enumerate(zip(m_before.tolist(), m_after.tolist(), strict=True)):
        if after == before:
            continue
        first, window = (sink_size + m * lag_size for m in (before, after))
        read = [*range(sink_size - part, sink_size), *range(first, window + lag_size)]
        token = torch.tensor(read, device=key_cache.device)
        key, value = (block_rows(x, source_table[b], token) for x in (key_cache, value_cache))
        scores = lag_score(key, value, part, lag_size, value_weight=value_weight, score=score, smooth=smooth)
        begin = torch.arange(part, part + window - first, lag_size, device=key_cache.device)
        kept = (topk_index(scores, keep) + begin[:, None]).flatten(2)
        behind = range(part + window - first, window - first + block_size if part else 0)
        mixed = torch.tensor([*range(part), *behind], device=key_cache.device).expand(1, heads, -1)
        rows = torch.cat([kept, mixed], dim=2).long()
        for pool, x in ((key_cache, key), (value_cache, value)):
            write_block_rows(pool, target_table[b], compact(x, rows)[0])
        index[b, :, : rows.shape[2]] = token[rows[0]]
    return index


def block_rows(pool: Tensor, table: Tensor, row: Tensor) -> Tensor:
    """Rows ``row [n]`` of a sequence with the blocks ``table``: ``[1, H, n, D]``, a copy.

    ``pool`` is ``[blocks, block_size, H, D]``, or ``[blocks, block_size / r, r, H, D / c, c]`` where no view has rows
    and channels in one dimension each.
    """
    found = pool[_block_places(pool, table, row)]
    return (found if pool.dim() == 4 else found.flatten(2)).transpose(0, 1)[None]


def write_block_rows(pool: Tensor, table: Tensor, rows: Tensor) -> None:
    """Write ``rows [H, n, D]`` to the first rows of a sequence with the blocks ``table``."""
    places = _block_places(pool, table, torch.arange(rows.shape[1], device=pool.device))
    rows = rows.transpose(0, 1)
    pool[places] = rows if pool.dim() == 4 else rows.unflatten(2, pool.shape[4:])


def _block_places(pool: Tensor, table: Tensor, row: Tensor) -> tuple[Tensor, ...]:
    block_size, _ = _pool_sizes(pool)
    block, row = table[row // block_size].long(), row % block_size
    return (block, row) if pool.dim() == 4 else (block, row // pool.shape[2], row % pool.shape[2])


def _pool_sizes(pool: Tensor) -> tuple[int, int]:
    """Rows of a block, and heads."""
    if pool.dim() == 4:
        return pool.shape[1], pool.shape[2]
    return pool.shape[1] * pool.shape[2], pool.shape[3]


def _compress(
    key: Tensor,
    value: Tensor,
    carried: Tensor | None,
    start: int,
    lag_size: int,
    keep: int,
    budget: str,
    scoring: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`compress_carried` where scores are carried, else `compress`."""
    if carried is not None:
        return compress_carried(key, value, carried, start, lag_size, keep, **scoring)
    return *compress(key, value, start, lag_size, keep, budget=budget, **scoring), None


def _partitions(x: Tensor, start: int, lag_size: int) -> Tensor:
    """The full partitions of ``x [B, H, N, D]`` as ``[B, H, P, L, D]``, in the arithmetic's dtype."""
    count = formulas.partition_count(x.shape[2], start, lag_size)
    tiles = x[:, :, start : start + count * lag_size].unflatten(2, (count, lag_size))
    return tiles.to(formulas.arithmetic_dtype(x.dtype))


def _std_score(tiles: Tensor) -> Tensor:
    """Equations 1 to 5 of the paper: softmax over tokens of the deviation over normalised channels."""
    lo = tiles[:, :, 1:].amin(dim=3, keepdim=True)
    hi = tiles[:, :, 1:].amax(dim=3, keepdim=True)
    # A channel with equal bounds says nothing about its tokens: y = 0.
    y = torch.where(hi == lo, 0.0, (tiles[:, :, :-1] - lo) / (hi - lo))
    if y.shape[-1] == 1:
        return torch.softmax(torch.zeros_like(y[..., 0]), dim=-1)
    return torch.softmax(y.std(dim=-1), dim=-1)


def _minus_cosine(tiles: Tensor) -> Tensor:
    """Minus the cosine between a token and the mean direction of the next partition; 0 for a norm of 0."""
    direction = _divide_or_zero(tiles, tiles.norm(dim=-1, keepdim=True))
    anchor = direction[:, :, 1:].mean(dim=3, keepdim=True)
    anchor = _divide_or_zero(anchor, anchor.norm(dim=-1, keepdim=True))
    return -(direction[:, :, :-1] * anchor).sum(dim=-1)  # [B, H, P-1, L]


def _cosine_score(tiles: Tensor) -> Tensor:
    """`_minus_cosine`, standardised over the partition."""
    s = _minus_cosine(tiles)
    if s.shape[-1] == 1:
        return torch.zeros_like(s)
    return _divide_or_zero(s - s.mean(dim=-1, keepdim=True), s.std(dim=-1, keepdim=True))


def _blend_score(tiles: Tensor) -> Tensor:
    """`_minus_cosine`, plus the paper's score in units of its mean ``1 / L``."""
    return _minus_cosine(tiles) + tiles.shape[3] * _std_score(tiles)


def _divide_or_zero(x: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 0.0, x / divisor)


def _kept_index(topk: Tensor, length: int, start: int, lag_size: int) -> Tensor:
    """Input positions of the output rows: sink, kept tokens ``topk [B, H, P-1, k]``, last partition and remainder."""
    batch, heads, compressed, _ = topk.shape
    if compressed == 0:
        return (
            torch.arange(length, dtype=torch.int32, device=topk.device).expand(batch, heads, length).clone()
        )
    window = start + compressed * lag_size
    position = torch.arange(length, dtype=torch.int32, device=topk.device).expand(batch, heads, length)
    kept = position[:, :, start:window].unflatten(2, (compressed, lag_size)).gather(3, topk.long())
    return torch.cat([position[:, :, :start], kept.flatten(2), position[:, :, window:]], dim=2)
