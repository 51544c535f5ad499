"""A quality check: one request replayed with the full and with the compressed cache, along what was said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lagkv_ext.cache.fidelity import departure, forward
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.serving.rollout.judge import Check

# Answer tokens in one step at most: two times as many rows of logits exist at one time.
_MOST = 64


def replay(
    model: Any,
    input_ids: Tensor,
    output_ids: Tensor,
    settings: Mapping[str, Any],
    *,
    prefill_chunk_size: int | None = None,
) -> Check:
    """Read the prompt ``input_ids [1, N]`` (or ``[N]``) and then the generated tokens ``output_ids [1, T]`` (or
    ``[T]``; without the prompt) with a `DynamicCache` and, beside it, with a `LagKVCache` of ``settings``. Integers.

    The compressed cache goes through the compressions of the generation: the prompt comes in one piece, or in the
    chunks in which `generate` was told to read it (``prefill_chunk_size``, else the ``boundary`` of ``settings``), and
    the answer in steps that end where a compression comes due. Between two compressions the tokens of a step see what
    they would see one by one, so the same rows stay; what differs is rounding, as between any two batch shapes of a
    model. (Quantised rows, models with linear and full attention in one layer: all tokens come one by one.) The full
    cache gets the same steps, so that nothing but compression differs.

    Costs two readings of the prompt and ``2 T / lag_size`` steps or so, both caches, and no other memory that grows
    with ``N``. Each answer token is judged given the right ones before it.

    Raises:
        TypeError, ValueError: ids that are no integers, several sequences, an empty prompt or answer.
    """
    prompt, said = (_ids(*x).to(model.device) for x in (("input_ids", input_ids), ("output_ids", output_ids)))
    if prefill_chunk_size is not None and prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")
    from transformers import DynamicCache

    from lagkv_ext import LagKVCache

    full, compressed = DynamicCache(config=model.config), LagKVCache(model.config, **settings)
    chunk = prefill_chunk_size or settings.get("boundary") or prompt.shape[1]
    return compare(model, prompt, said, full, compressed, chunk)


def compare(model: Any, prompt: Tensor, said: Tensor, full: Any, compressed: Any, chunk: int) -> Check:
    """`replay` with two empty caches, which are used up: ``prompt [1, N]`` in chunks, and ``said [1, T]``."""
    caches, position, tokens = (full, compressed), prompt.shape[1], said.shape[1]
    agreed, kl, less = 0, 0.0, False

    def judge(ids: Tensor, begin: int, logits_to_keep: int) -> None:
        nonlocal agreed, kl, less
        less = less or _sees_less(compressed)
        logits = [forward(model, ids, x, position=begin, logits_to_keep=logits_to_keep) for x in caches]
        agree, apart = departure(*(x[0].float().log_softmax(dim=-1) for x in logits))
        agreed += int(agree.sum())
        kl += float(apart.double().sum())

    with torch.inference_mode():
        last = (position - 1) // chunk * chunk  # where the last chunk begins
        for cache in caches:
            for begin in range(0, last, chunk):
                ids = prompt[:, begin : begin + chunk]
                forward(model, ids, cache, position=begin, logits_to_keep=1)
        judge(prompt[:, last:], last, 1)
        done = 0
        while done < tokens - 1:  # what follows the last token was never said
            step = min(_next_step(compressed), _MOST, tokens - 1 - done)
            judge(said[:, done : done + step], position + done, 0)
            done += step
    # A model that says no number has nothing to agree with.
    return Check(
        agreed / tokens if math.isfinite(kl) else 0.0,
        kl / tokens if math.isfinite(kl) else math.inf,
        tokens,
        position,
        less,
    )


def _sees_less(cache: Any) -> bool:
    """Tells whether attention of the next step sees fewer rows than tokens, or quantised ones."""
    return any(x.rows < x.seen or x.quantized_rows for x in cache.layers if isinstance(x, LagKVLayer))


def _next_step(cache: Any) -> int:
    """Tokens that may come at once, with the result of one by one."""
    return min(x.tokens_at_once(_MOST) for x in cache.layers if isinstance(x, LagKVLayer))


def _ids(name: str, ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"a tensor of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of token ids, got {got}")
    row = ids[None] if ids.dim() == 1 else ids
    if row.dim() != 2 or row.shape[0] != 1 or row.shape[1] == 0:
        raise ValueError(
            f"{name} must be one sequence, [1, n] or [n] with n >= 1, got shape {list(ids.shape)}"
        )
    return row.long()
