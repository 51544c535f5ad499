"""Properties of every family that is served. Each check compares with transformers' `DynamicCache`.

A check returns a note on what it could not compare, or raises `Different`, `NothingToCompare` or an error.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from lagkv_ext import LagKVCache, LagKVStaticCache
from tests.sweep.subject import NothingToCompare, Subject

LAG_SIZE, SINK, KEEP = 8, 6, 2
SETTINGS = {"lag_size": LAG_SIZE, "sink_size": SINK}
PROMPT = 40  #: three partitions of it are compressed
PADDED = 11  #: tokens that the second sequence of a padded batch has less
#: Tolerance relative to the largest logit, by dtype. Parts of most models compute in float32 whatever it is.
TOLERANCE = {torch.float64: 2e-5, torch.float32: 5e-4}
VISIBLE = 1e-3  #: what dropping rows must change at least, or a check could not fail


class Different(AssertionError):
    """A family is served, and something comes out otherwise."""


def uncompressed_prompt(subject: Subject) -> str | None:
    """keep_ratio=1, the prompt in one piece."""
    return _keeps_all(subject, [PROMPT])


def uncompressed_chunks(subject: Subject) -> str | None:
    """keep_ratio=1, several tokens at once after the prompt."""
    return _keeps_all(subject, [30, 7, 3])


def uncompressed_decoding(subject: Subject) -> str | None:
    """keep_ratio=1, one token at a time after the prompt."""
    return _keeps_all(subject, [21, *[1] * 19])


def generation(subject: Subject) -> str | None:
    """`generate` gives the tokens of `DynamicCache` with keep_ratio=1, and runs to its end compressed."""
    ids = subject.tokens(PROMPT, batch=2)
    expected = _with_dynamic_cache(lambda: subject.generate(subject.uncompressed(), ids, 12))
    if not torch.equal(subject.generate(_cache(subject, keep_ratio=1), ids, 12), expected):
        raise Different("generate gives other tokens with keep_ratio=1")
    cache = _cache(subject)
    if subject.generate(cache, ids, 12).shape != expected.shape:
        raise Different("generate gives another number of tokens with a compressed cache")
    if not all(cache.report().layers[i].compressions for i in cache.compressed_layers):
        raise Different("generate compressed nothing")
    return None


def padding_left(subject: Subject) -> str | None:
    """A batch padded on the left: keep_ratio=1 as `DynamicCache`; compressed, every sequence as if alone."""
    return _padding(subject, "left")


def padding_right(subject: Subject) -> str | None:
    """The same, padded between the prompt and what follows."""
    if not subject.takes_positions:
        raise NothingToCompare("forward takes no position_ids")
    return _padding(subject, "right")


def rows(subject: Subject) -> str | None:
    """Compressed layers hold what the operator leaves of the states of `DynamicCache`; others hold what it holds."""
    ids, dynamic, cache = subject.tokens(PROMPT + 20, batch=2), subject.uncompressed(), _cache(subject)
    expected = _with_dynamic_cache(lambda: subject.forward(dynamic, ids, [PROMPT]))
    with _recorded(cache) as states:
        _same(subject.forward(cache, ids, [PROMPT]), expected, "logits of the prompt")
        _same_layers(subject, cache, dynamic, states)
        subject.forward(cache, ids, [1] * 20, seen=PROMPT)
        for i in cache.compressed_layers:
            key, value, positions = _left_by_operator(states[id(cache.layers[i])])
            held = cache.layers[i]
            if not (torch.equal(held.keys, key) and torch.equal(held.values, value)):
                raise Different(f"layer {i} holds other rows than the operator leaves")
            if not torch.equal(cache.kept_positions(i), positions):
                raise Different(f"layer {i} names other positions than the operator")
    return None


def layers(subject: Subject) -> str | None:
    """Attention of a compressed layer sees every row of a head, in whatever order, whatever other heads hold there."""
    ids = subject.tokens(PROMPT + 3)
    probe, dynamic = _cache(subject), subject.uncompressed()
    subject.forward(probe, ids, [PROMPT])
    _with_dynamic_cache(lambda: subject.forward(dynamic, ids, [PROMPT]))
    for i in probe.compressed_layers:
        held = dynamic.layers[i].keys.shape[2]
        if held != subject.rows_before + PROMPT:
            raise Different(f"layer {i} is compressed, and its {held} rows are not the {PROMPT} tokens")
        for new in (1, 3):
            difference = _sees_a_set(subject, dynamic, i, ids[:, : PROMPT + new])
            if difference is not None:
                raise Different(f"layer {i} is compressed, and {difference}")
    return None


def attention(subject: Subject) -> str | None:
    """Dropping rows is the same as hiding them from the uncompressed model, for one token and for several at once."""
    chunks = [PROMPT, 1, 1, 3, 1, 1, 5, 1, 9, 1]
    ids, cache = subject.tokens(sum(chunks)), _cache(subject)
    for i, layer in enumerate(cache.layers):
        left_alone = i not in cache.compressed_layers and type(layer).__module__.startswith(
            "transformers.models"
        )
        if left_alone and not getattr(layer, "is_sliding", True):
            raise NothingToCompare(f"layer {i} sees all rows, and a mask would hide them from it too")
    visible: dict[int, Tensor] = {0: torch.zeros(0, dtype=torch.long)}  # positions held, by tokens seen
    logits, seen = [], 0
    with _same_rows_in_all_heads():
        for new in chunks:
            logits.append(subject.forward(cache, ids, [new], seen=seen))
            seen += new
            positions = {
                tuple(head) for i in cache.compressed_layers for head in cache.kept_positions(i)[0].tolist()
            }
            if len(positions) != 1:
                raise RuntimeError("the selection of the operators was not replaced")
            visible[seen] = torch.tensor(positions.pop()) - subject.rows_before

    def mask(begin: int, end: int) -> Tensor:
        hidden = torch.zeros(1, end, dtype=torch.long)
        hidden[:, visible[begin][visible[begin] >= 0]] = 1
        hidden[:, begin:] = 1
        return hidden

    got = torch.cat(logits, dim=1)
    expected = _with_dynamic_cache(lambda: subject.forward(subject.uncompressed(), ids, chunks, mask))
    _same(got, expected, "rows dropped against rows hidden")
    if _distance(got, subject.forward(subject.uncompressed(), ids, chunks)) < VISIBLE:
        raise Different("dropping rows changes nothing: this check could not fail")
    return None


def ratios(subject: Subject) -> str | None:
    """Layers with ratios of their own and layers that are skipped: several tokens at once, and padding."""
    compressed = _cache(subject).compressed_layers
    first = 46 - subject.rows_before  # after it, 6 tokens set off no compression
    ids = subject.tokens(first + 6, batch=2)

    def run(cache: Any, chunks: list[int]) -> Tensor:
        return subject.forward(cache, ids, chunks)

    at_once, one_by_one = [first, 6], [first, *[1] * 6]
    expected = _with_dynamic_cache(lambda: run(subject.uncompressed(), at_once))
    _same(run(_cache(subject, skip_layers=compressed), at_once), expected, "all layers skipped")
    all_ones = dict.fromkeys(compressed, 1.0)
    _same(run(_cache(subject, layer_keep_ratio=all_ones), at_once), expected, "layer_keep_ratio 1 everywhere")
    if len(compressed) < 2:
        raise NothingToCompare("there is one full-attention layer")

    def mixed() -> LagKVCache:
        return _cache(subject, layer_keep_ratio={compressed[0]: 0.5}, skip_layers=[compressed[-1]])

    got, steps = run(mixed(), at_once), run(mixed(), one_by_one)
    plain = _with_dynamic_cache(lambda: run(subject.uncompressed(), one_by_one))
    if not _close(plain, expected):
        return "several tokens at once are not as one by one with DynamicCache: not compared"
    _same(got, steps, "ratios of their own: several tokens at once against one by one")
    if _distance(got, expected) < VISIBLE:
        raise Different("ratios of their own change nothing: this check could not fail")
    return _padded_as_alone(subject, "left", mixed)


def static(subject: Subject) -> str | None:
    """`LagKVStaticCache` is `DynamicCache` before it compresses, and `LagKVCache` with as many tokens afterwards."""
    capacity, ids = 40, subject.tokens(90, batch=2)

    def fixed() -> LagKVStaticCache:
        return subject.fixed(capacity=capacity, keep=KEEP, **SETTINGS)

    before = [12 - subject.rows_before, *[1] * 6]
    expected = _with_dynamic_cache(lambda: subject.forward(subject.uncompressed(), ids, before))
    _same(subject.forward(fixed(), ids, before), expected, "before a compression")
    long = [30, *[1] * 55]
    growing, cache = _cache(subject, max_tokens=capacity), fixed()
    _same(subject.forward(cache, ids, long), subject.forward(growing, ids, long), "against LagKVCache")
    for i in growing.compressed_layers:
        if not torch.equal(cache.kept_positions(i), growing.kept_positions(i)):
            raise Different(f"layer {i} holds other positions than LagKVCache")
    return _padded_as_alone(subject, "left", fixed, steps=([1] * 5,))


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "prompt": uncompressed_prompt,
    "chunks": uncompressed_chunks,
    "decoding": uncompressed_decoding,
    "generate": generation,
    "rows": rows,
    "layers": layers,
    "attention": attention,
    "padding left": padding_left,
    "padding right": padding_right,
    "ratios": ratios,
    "static": static,
}


def why_refused(subject: Subject) -> str | None:
    """Measures with `DynamicCache` what goes wrong in a refused family; None where nothing was found."""
    ids, cache = subject.tokens(PROMPT + 1), subject.uncompressed()
    try:
        whole = subject.forward(cache, ids, [PROMPT])
        subject.forward(copy.deepcopy(cache), ids, [1], seen=PROMPT)
    except Exception as error:
        return f"it does not decode with DynamicCache ({type(error).__name__})"
    full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not full:
        return f"no layer has full attention alone ({', '.join(sorted({type(x).__name__ for x in cache.layers}))})"
    if not cache.get_seq_length():
        return "DynamicCache stays empty"
    for i in full:
        heads, rows = cache.layers[i].keys.shape[1:3]
        if rows != subject.rows_before + PROMPT:
            return f"a layer holds {rows} rows after {PROMPT} tokens"
        if heads == 1 and getattr(subject.config.get_text_config(decoder=True), "num_key_value_heads", 1) > 1:
            return "all heads share one row"
        difference = _sees_a_set(subject, cache, i, ids)
        if difference is not None:
            return difference
    changed = ids.clone()
    changed[:, PROMPT - 1] = 3 + (changed[:, PROMPT - 1] - 2) % 90
    if not _close(subject.forward(subject.uncompressed(), changed, [PROMPT])[:, :20], whole[:, :20]):
        return "tokens attend to later ones"
    masks = [torch.ones(1, PROMPT + 1, dtype=torch.long) for _ in range(2)]
    masks[1][:, 10:20] = 0
    hidden = [subject.forward(copy.deepcopy(cache), ids, [1], lambda *_, m=m: m, PROMPT) for m in masks]
    return "a mask hides nothing from a single token" if _close(*hidden) else None


# -- how two caches are compared


def _cache(subject: Subject, **settings: Any) -> LagKVCache:
    settings = {**SETTINGS, **settings}
    return subject.compressed(**settings if "keep_ratio" in settings else {"keep": KEEP, **settings})


def _distance(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    distance = float((got - expected).abs().max() / expected.abs().max())
    return distance if distance == distance else float("inf")


def _close(got: Tensor, expected: Tensor) -> bool:
    return _distance(got, expected) <= TOLERANCE[expected.dtype]


def _same(got: Tensor, expected: Tensor, what: str) -> None:
    if not _close(got, expected):
        raise Different(f"{what}: differs by {_distance(got, expected):.0e} of the largest")


def _with_dynamic_cache(call: Callable[[], Tensor]) -> Tensor:
    try:
        result = call()
    except NothingToCompare:
        raise
    except Exception as error:
        raise NothingToCompare(f"DynamicCache: {type(error).__name__}: {str(error)[:120]}") from error
    if not torch.isfinite(result).all():
        raise NothingToCompare("DynamicCache: logits are not finite")
    return result


def _keeps_all(subject: Subject, chunks: list[int]) -> None:
    ids = subject.tokens(sum(chunks), batch=2)
    expected = _with_dynamic_cache(lambda: subject.forward(subject.uncompressed(), ids, chunks))
    _same(subject.forward(_cache(subject, keep_ratio=1), ids, chunks), expected, "logits")


# -- padding


def _padding(subject: Subject, side: str) -> str | None:
    ids, mask = _padded_batch(subject, side)
    tokens = mask.bool()
    for rest in ([1] * 5, [5]):
        chunks = [PROMPT, *rest]
        expected = _with_dynamic_cache(
            lambda c=chunks: subject.forward(subject.uncompressed(), ids, c, mask)[tokens]
        )
        got = subject.forward(_cache(subject, keep_ratio=1), ids, chunks, mask)
        _same(got[tokens], expected, f"keep_ratio=1, then {rest}")
    return _padded_as_alone(subject, side, lambda: _cache(subject))


def _padded_batch(subject: Subject, side: str) -> tuple[Tensor, Tensor]:
    """A prompt of which the second sequence is shorter, and 5 more tokens."""
    ids = subject.tokens(PROMPT + 5, batch=2)
    mask = torch.ones_like(ids)
    padded = slice(0, PADDED) if side == "left" else slice(PROMPT - PADDED, PROMPT)
    ids[1, padded] = mask[1, padded] = 0
    return ids, mask


def _padded_as_alone(
    subject: Subject, side: str, make: Callable[[], Any], steps: tuple[list[int], ...] = ([1] * 5, [5])
) -> str | None:
    """The padded sequence gets the logits that it gets alone, where `DynamicCache` gives it the same."""
    ids, mask = _padded_batch(subject, side)
    tokens = mask[1].bool()
    alone = ids[1:, tokens]
    for rest in steps:
        got = subject.forward(make(), ids, [PROMPT, *rest], mask)[1, tokens]
        chunks = [PROMPT - PADDED, *rest]
        padded_cache, alone_cache = subject.uncompressed(), subject.uncompressed()
        padded = _with_dynamic_cache(
            lambda r=rest, c=padded_cache: subject.forward(c, ids, [PROMPT, *r], mask)[1, tokens]
        )
        expected = _with_dynamic_cache(lambda r=chunks, c=alone_cache: subject.forward(c, alone, r)[0])
        if not _close(padded, expected):
            return "a padded sequence is not as alone with DynamicCache: not compared compressed"
        for a, b in zip(padded_cache.layers, alone_cache.layers, strict=True):
            if type(a) is DynamicLayer and not _close(a.keys[1:, :, -5:], b.keys[:, :, -5:]):
                return "padding counts as positions: not compared compressed"
        _same(
            got, subject.forward(make(), alone, chunks)[0], f"compressed, then {rest}: padded against alone"
        )
    return None


# -- what layers hold


@contextlib.contextmanager
def _recorded(cache: LagKVCache) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """The states that every layer is given, step by step, by the id of the layer."""
    states: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    classes = {type(cache.layers[i]) for i in cache.compressed_layers}
    originals = {cls: cls.update for cls in classes}

    def recording(update: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            states[id(self)].append((key.clone(), value.clone()))
            return update(self, key, value, *args, **kwargs)

        return recorded

    for cls, update in originals.items():
        cls.update = recording(update)  # type: ignore[method-assign]
    try:
        yield states
    finally:
        for cls, update in originals.items():
            cls.update = update  # type: ignore[method-assign]


def _same_layers(subject: Subject, cache: LagKVCache, dynamic: Any, states: dict[int, Any]) -> None:
    """After a prompt: what compressed layers were given is what `DynamicCache` holds, and so is what others hold."""
    if len(cache.layers) != len(dynamic.layers):
        raise Different(f"the cache has {len(cache.layers)} layers, DynamicCache {len(dynamic.layers)}")
    for i, (layer, other) in enumerate(zip(cache.layers, dynamic.layers, strict=True)):
        if not isinstance(other, CacheLayerMixin) or not other.is_initialized:
            continue
        if i in cache.compressed_layers:
            given = states[id(layer)]
            if len(given) != 1:
                raise Different(f"layer {i} is compressed, and gets rows {len(given)} times in a step")
            key, value = given[0]
        else:
            key, value = layer.keys, layer.values
        _same(key, other.keys, f"keys of layer {i}")
        _same(value, other.values, f"values of layer {i}")


def _left_by_operator(steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions that the operator leaves of these states, compressed after every step that may."""
    key, value = (x[:, :, :0] for x in steps[0])
    positions = torch.zeros(*key.shape[:3], dtype=torch.int32)
    start, seen = SINK, 0
    for new_key, new_value in steps:
        arrived = torch.arange(seen, seen + new_key.shape[2], dtype=torch.int32).expand(new_key.shape[:3])
        seen += new_key.shape[2]
        key, value = torch.cat([key, new_key], dim=2), torch.cat([value, new_value], dim=2)
        positions = torch.cat([positions, arrived], dim=2)
        count = (key.shape[2] - start) // LAG_SIZE - 1
        if count >= 1:
            key, value, index = torch.ops.lagkv.compress(key, value, start, LAG_SIZE, KEEP)
            positions = positions.gather(2, index.long())
            start += count * KEEP
    return key, value, positions


def _sees_a_set(subject: Subject, cache: Any, layer: int, ids: Tensor) -> str | None:
    """None where the tokens after the prompt attend to the rows of each head as to a set: in no window, with no bias by
    number, and whatever other heads hold beside."""
    new = [ids.shape[1] - PROMPT]
    expected = subject.forward(copy.deepcopy(cache), ids, new, seen=PROMPT)
    shuffled = copy.deepcopy(cache)
    held = shuffled.layers[layer]
    order = torch.rand(held.keys.shape[:3], generator=torch.Generator().manual_seed(0)).argsort(dim=2)[
        ..., None
    ]
    held.keys = held.keys.gather(2, order.expand_as(held.keys))
    held.values = held.values.gather(2, order.expand_as(held.values))
    if _close(subject.forward(shuffled, ids, new, seen=PROMPT), expected):
        return None
    return "its rows in another order, another in every head, change the logits"


@contextlib.contextmanager
def _same_rows_in_all_heads() -> Iterator[None]:
    """The operators keep rows by their place in a partition, so that all heads and layers keep the same ones."""

    def compress(key: Tensor, value: Tensor, start: int, lag_size: int, keep: int, **scoring: Any) -> Any:
        rows = key.shape[2]
        count = max((rows - start) // lag_size - 1, 0)
        kept = list(range(start))
        for p in range(count):
            places = sorted({(p + 5 * x) % lag_size for x in range(keep)})
            kept += [start + p * lag_size + place for place in places]
        kept += range(start + count * lag_size, rows)
        index = torch.tensor(kept, dtype=torch.int32).expand(*key.shape[:2], len(kept)).contiguous()
        return key[:, :, kept], value[:, :, kept], index

    def compress_(key: Tensor, value: Tensor, *args: Any, **scoring: Any) -> Tensor:
        new_key, new_value, index = compress(key, value, *args, **scoring)
        key[:, :, : index.shape[2]], value[:, :, : index.shape[2]] = new_key, new_value
        return index

    operators = torch.ops.lagkv
    originals = operators.compress, operators.compress_
    operators.compress, operators.compress_ = compress, compress_
    try:
        yield
    finally:
        operators.compress, operators.compress_ = originals
