"""From a model and a text, or a saved cache, to an `Explanation`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lagkv_ext import LagKVCache
from lagkv_ext.cache.fidelity import forward
from lagkv_ext.commands.explain.explanation import ExplainError, Explanation, Tokens
from lagkv_ext.commands.explain.recorder import RecordedCache, held_layer
from lagkv_ext.commands.explain.tokens import tokenize

Progress = Callable[[str, int, int], None]  # what is being done, tokens done, tokens in all


def explain(
    loaded: Any,
    text: str,
    settings: Mapping[str, Any] | None = None,
    *,
    chunk: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Explanation:
    """Read ``text`` with a `lagkv_ext.commands.models.LoadedModel` and say what its cache kept, and why.

    ``settings``: arguments of `LagKVCache` (`lagkv_ext.read_settings`). ``chunk``: tokens read at a time, as a server
    does with long prompts; 1 as in decoding; by default the text is read in one piece.

    Raises ExplainError: an empty text or one longer than the model's context, settings that the cache refuses.
    """
    if chunk is not None and chunk < 1:
        raise ExplainError(f"chunk must be at least 1 token, got {chunk}")
    if not text:
        raise ExplainError("the text is empty: there is nothing to explain")
    tokens = tokenize(loaded.tokenizer, text)
    count = len(tokens.ids)
    if count == 0:
        raise ExplainError("the tokenizer makes no token of this text: there is nothing to explain")
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and count > limit:
        raise ExplainError(f"the text has {count} tokens, and the model's context is {limit} tokens long")
    try:
        cache = RecordedCache(loaded.model.config, **(settings or {}))
    except (TypeError, ValueError) as error:
        raise ExplainError(f"this cache cannot be made for {loaded.name}: {error}") from error
    ids = torch.tensor([tokens.ids], device=loaded.model.device)
    step = chunk or count
    with torch.inference_mode():
        for begin in range(0, count, step):
            progress("reading the text", begin, count)
            forward(loaded.model, ids[:, begin : begin + step], cache, position=begin, logits_to_keep=1)
        progress("reading the text", count, count)
        layers = cache.recorded()
    others = {i: type(x).__name__ for i, x in enumerate(cache.layers) if i not in {y.index for y in layers}}
    return Explanation(
        loaded.name,
        "model",
        count,
        layers,
        tokens,
        others,
        dict(settings or {}),
        chunk if step < count else None,
    )


def explain_saved(
    path: str | os.PathLike,
    config: Any,
    *,
    model: str = "",
    tokens: Tokens | None = None,
    sequence: int = 0,
) -> Explanation:
    """Explains a file of ``LagKVCache.save``, for the model with this ``config``.

    Scores and ranks are not in it. ``tokens``: of the text that it was made from, if that is known. ``sequence``: of
    the batch.

    Raises ExplainError: no such file, a damaged one, one of another model; more tokens than the cache has seen.
    """
    try:
        cache = LagKVCache.load(path, config)
    except (FileNotFoundError, ValueError) as error:
        raise ExplainError(
            str(error) if isinstance(error, ValueError) else f"there is no file {path}"
        ) from error
    except OSError as error:
        raise ExplainError(f"{path} cannot be read: {error}") from error
    seen = cache.get_seq_length()
    if seen == 0:
        raise ExplainError(f"{path} is the cache of no tokens: there is nothing to explain")
    if tokens is not None and len(tokens.ids) > seen:
        raise ExplainError(
            f"the text has {len(tokens.ids)} tokens, and the cache in {path} has seen {seen}: it is not its text"
        )
    full = [i for i, x in enumerate(cache.layers) if hasattr(x, "settings")]
    batch = cache.kept_positions(full[0]).shape[0]
    if not 0 <= sequence < batch:
        raise ExplainError(f"{path} has {batch} sequences, numbered from 0; there is no sequence {sequence}")
    layers = tuple(held_layer(cache, i, sequence) for i in full)
    others = {i: type(x).__name__ for i, x in enumerate(cache.layers) if i not in full}
    return Explanation(model, "saved cache", seen, layers, tokens, others)
