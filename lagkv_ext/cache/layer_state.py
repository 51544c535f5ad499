"""States of layers as named tensors and plain numbers, and layers made from them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lagkv_ext import formulas
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.growing.buffer import plain_tensors
from lagkv_ext.cache.growing.dense import DenseRows
from lagkv_ext.cache.growing.layer import LagKVLayer
from lagkv_ext.cache.quantized.quantizer import QuantizedRows, quantize
from lagkv_ext.cache.quantized.rows import CodedRows


@dataclasses.dataclass
class LayerState:
    """``numbers`` are JSON: lengths and flags. A layer that has seen no token has no tensors."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class WrongState(ValueError):
    """A state that its layer cannot have; says what is wrong, not where."""


def state_of(layer: Any) -> LayerState:
    """ValueError for a kind of layer that is not known here."""
    name = _name(layer)
    state = LayerState({}, {"kind": name})
    for part in _kind(name):
        part.read(layer, state)
    return state


def restore(layer: Any, state: LayerState) -> None:
    """Fill an empty layer of the same kind and settings.

    Raises:
        WrongState: names, shapes or numbers that do not fit this kind of layer, or one another.
    """
    name = _name(layer)
    if state.numbers.get("kind") != name:
        raise WrongState(f"it is a {state.numbers.get('kind')}, this model has a {name} there")
    names = set(state.tensors)
    for part in _kind(name):
        with plain_tensors():
            names -= part.write(layer, state)
    if names:
        raise WrongState(f"it has tensors that a {name} does not know: {sorted(names)}")


# -- rows that LagKV compresses


def _read_lagkv(layer: LagKVLayer, state: LayerState) -> None:
    held = layer.held
    held.settle()
    assert isinstance(held, (DenseRows, CodedRows))
    track = held.track
    state.numbers.update(
        settings=dataclasses.asdict(layer.settings),
        seen=track.seen,
        rows=track.rows,
        start=track.start,
        compressions=track.compressions,
    )
    if held.buffer is not None:
        state.tensors.update(key=held.buffer.key, value=held.buffer.value)
        for name in _TRACKED:
            if (tensor := getattr(track, name)) is not None:
                state.tensors[name] = tensor
    if isinstance(held, CodedRows) and held.codes is not None:
        tensors = [x for rows in held.codes for x in rows.storages]
        state.tensors.update(zip(_CODES, tensors, strict=True))


def _write_lagkv(layer: LagKVLayer, state: LayerState) -> set[str]:
    _check_settings(dataclasses.asdict(layer.settings), state.numbers.get("settings"))
    seen, rows, start, compressions = (
        _number(state, name) for name in ("seen", "rows", "start", "compressions")
    )
    if seen == 0 and not state.tensors:
        return set()
    quantized = _quantized(layer, state)
    coded = 0 if quantized is None else quantized[0].rows
    key, value = _pair(state, "key", "value", rows - coded)
    if quantized is not None:
        _check_quantized(quantized, (key, value))
    sink = layer.settings.sink_size
    if not rows <= seen or not start >= sink:
        raise WrongState(f"its numbers cannot be: seen {seen}, rows {rows}, start {start}, sink_size {sink}")
    chosen = state.tensors.get("chosen")
    if (chosen is not None) != (compressions > 0):
        raise WrongState(
            f"it was compressed {compressions} times, and has {'no ' * (chosen is None)}chosen rows"
        )
    if chosen is not None:
        fits = chosen.dim() == 3 and chosen.shape[:2] == key.shape[:2] and chosen.shape[2] <= rows - sink
        if chosen.dtype != torch.int32 or not fits:
            raise WrongState(
                f"chosen must be int32 {list(key.shape[:2])} by at most {rows - sink}, got {chosen.dtype} "
                f"{list(chosen.shape)}"
            )
        if not bool(((chosen >= sink) & (chosen < seen)).all()) or not bool((chosen.diff(dim=2) > 0).all()):
            raise WrongState(f"chosen must hold ascending positions from {sink} to {seen - 1}")
    scores = _carried_scores(layer, state, key, chosen)
    track = Track.restored(layer.settings, seen, rows, start, compressions, chosen, scores)
    LagKVLayer.lazy_initialization(layer, key, value)
    if layer.settings.quantization is None:
        layer.hold_rows(DenseRows.of_rows(layer.compressor, key, value, track))
    else:
        layer.hold_rows(CodedRows.of_rows(layer.compressor, key, value, track, quantized))
    return {"key", "value", *_TRACKED, *(_CODES if quantized is not None else ())}


def _carried_scores(
    layer: LagKVLayer, state: LayerState, key: Tensor, chosen: Tensor | None
) -> Tensor | None:
    scores = state.tensors.get("scores")
    expected = chosen is not None and layer.settings.carries_scores
    if (scores is not None) != expected:
        raise WrongState(f"it has {'no ' * (scores is None)}scores of its chosen rows")
    if scores is None or chosen is None:
        return None
    dtype = formulas.arithmetic_dtype(key.dtype)
    if scores.shape != chosen.shape or scores.dtype != dtype:
        raise WrongState(
            f"scores must be {dtype} {list(chosen.shape)}, got {scores.dtype} {list(scores.shape)}"
        )
    return scores


_TRACKED = ("chosen", "scores")
_CODES = ("key_codes", "key_scale", "value_codes", "value_scale")


def _quantized(layer: LagKVLayer, state: LayerState) -> tuple[QuantizedRows, QuantizedRows] | None:
    form = layer.settings.quantization
    found = [name for name in _CODES if name in state.tensors]
    if form is None or not found:
        return None
    if len(found) < len(_CODES):
        raise WrongState(f"{', '.join(set(_CODES) - set(found))} missing")
    parts = []
    for name in ("key", "value"):
        plain, codes, scale = (state.tensors.get(x) for x in (name, f"{name}_codes", f"{name}_scale"))
        if plain is None or plain.dim() != 4:
            raise WrongState(f"{name} is missing or not [B, H, rows, D]")
        parts.append(QuantizedRows(form, plain.shape[3], plain.dtype, codes, scale))  # type: ignore[arg-type]
    return parts[0], parts[1]


def _check_quantized(quantized: tuple[QuantizedRows, QuantizedRows], plain: tuple[Tensor, Tensor]) -> None:
    count = quantized[0].rows if quantized[0].codes.dim() == 4 else -1
    for rows, like in zip(quantized, plain, strict=True):
        empty = quantize(like[:, :, :0], rows.form)
        for theirs, ours, what in ((rows.codes, empty.codes, "codes"), (rows.scale, empty.scale, "scales")):
            shape = [*ours.shape[:2], count, ours.shape[3]]
            if list(theirs.shape) != shape or theirs.dtype != ours.dtype:
                raise WrongState(
                    f"its {what} must be {ours.dtype} {shape}, got {theirs.dtype} {list(theirs.shape)}"
                )


#: Settings that files of earlier versions lack, as those had them.
_ADDED_SETTINGS = {"smooth": 1, "budget": "partition"}


def _check_settings(ours: dict[str, Any], theirs: Any) -> None:
    theirs = _ADDED_SETTINGS | (theirs if isinstance(theirs, dict) else {})
    different = [
        f"{name} {theirs.get(name)!r} (asked for: {value!r})"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if different:
        raise WrongState(f"it was made with other settings: {', '.join(different)}")


# -- a sliding window


def _read_window(layer: Any, state: LayerState) -> None:
    seen, window = layer.cumulative_length, layer.sliding_window
    state.numbers.update(window=window, seen=seen)
    if layer.keys is not None and layer.values is not None:
        # A layer that records the past (assisted decoding) holds more rows than its window.
        surplus = layer.keys.shape[2] - min(seen, window - 1)
        state.tensors.update(key=layer.keys[:, :, surplus:], value=layer.values[:, :, surplus:])


def _write_window(layer: Any, state: LayerState) -> set[str]:
    if state.numbers.get("window") != layer.sliding_window:
        raise WrongState(
            f"it has a window of {state.numbers.get('window')} tokens, this model one of {layer.sliding_window}"
        )
    seen = _number(state, "seen")
    if seen == 0 and not state.tensors:
        return set()
    key, value = _pair(state, "key", "value", None)
    least = min(seen, layer.sliding_window - 1)
    # Version 1 stored the surplus of a layer that recorded the past.
    if not least <= key.shape[2] <= (seen if state.numbers.get("record_past") else least):
        raise WrongState(f"it has {key.shape[2]} rows after {seen} tokens, where {least} are needed")
    surplus = key.shape[2] - least
    key, value = key[:, :, surplus:], value[:, :, surplus:]
    layer.lazy_initialization(key, value)
    layer.keys, layer.values, layer.cumulative_length = key, value, seen
    return {"key", "value"}


# -- convolution and recurrent states


def _read_linear(layer: Any, state: LayerState) -> None:
    state.numbers.update(
        states=layer.number_of_states,
        previous=list(layer.has_previous_state.values()),
        kernels=list(layer.conv_kernel_size.values()),
    )
    for i, x in layer.conv_states.items():
        if x is not None:
            state.tensors[f"conv.{i}"] = _of_kernel(x, layer.conv_kernel_size[i])
    state.tensors.update({f"recurrent.{i}": x for i, x in layer.recurrent_states.items() if x is not None})


def _write_linear(layer: Any, state: LayerState) -> set[str]:
    numbers, count = state.numbers, layer.number_of_states
    previous, kernels = (numbers.get(name) or [] for name in ("previous", "kernels"))
    if numbers.get("states") != count or not all(
        isinstance(x, list) and len(x) == count for x in (previous, kernels)
    ):
        raise WrongState(f"it has {numbers.get('states')} states, this model has {count}")
    names = set()
    for i in range(count):
        conv, recurrent = state.tensors.get(f"conv.{i}"), state.tensors.get(f"recurrent.{i}")
        if conv is not None:
            conv = _of_kernel(conv, kernels[i])
            layer.lazy_initialization(conv_states=conv, state_idx=i, conv_kernel_size=kernels[i])
            if layer.conv_states[i].shape == conv.shape:
                layer.conv_states[i].copy_(conv)  # at the address that was marked as static
            else:
                layer.conv_states[i] = conv
            names.add(f"conv.{i}")
        if recurrent is not None:
            layer.lazy_initialization(recurrent_states=recurrent, state_idx=i)
            layer.recurrent_states[i].copy_(recurrent)
            names.add(f"recurrent.{i}")
        if previous[i] and conv is None and recurrent is None:
            raise WrongState(f"state {i} is missing")
        layer.has_previous_state[i] = bool(previous[i])
    return names


def _of_kernel(conv: Tensor, kernel: int) -> Tensor:
    """Convolution states as wide as the kernel: a layer that records the past (assisted decoding) holds more, or less
    after a short prompt."""
    return torch.nn.functional.pad(conv, (max(kernel - conv.shape[-1], 0), 0))[..., -kernel:]


# -- kinds


@dataclasses.dataclass(frozen=True)
class _Part:
    read: Callable[[Any, LayerState], None]
    write: Callable[[Any, LayerState], set[str]]  #: returns the names of the tensors that it took or allows


_LAGKV = _Part(_read_lagkv, _write_lagkv)
_WINDOW = _Part(_read_window, _write_window)
_LINEAR = _Part(_read_linear, _write_linear)
# The names are part of the file format.
_KINDS: Mapping[str, tuple[_Part, ...]] = {
    "LagKVLayer": (_LAGKV,),
    "LagKVHybridLayer": (_LINEAR, _LAGKV),
    "QuantizedLagKVLayer": (_LAGKV,),
    "DynamicSlidingWindowLayer": (_WINDOW,),
    "LinearAttentionLayer": (_LINEAR,),
    "DummyLayer": (),
}


def _name(layer: Any) -> str:
    name = type(layer).__name__
    quantized = name == "LagKVLayer" and layer.settings.quantization is not None
    return f"Quantized{name}" if quantized else name


def _kind(name: str) -> tuple[_Part, ...]:
    if name not in _KINDS:
        raise ValueError(f"a {name} cannot be saved; layers that can be: {', '.join(_KINDS)}")
    return _KINDS[name]


def _number(state: LayerState, name: str) -> int:
    value = state.numbers.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WrongState(f"{name} must be a number of tokens, got {value!r}")
    return value


def _pair(state: LayerState, *names_and_rows: Any) -> tuple[Tensor, Tensor]:
    *names, rows = names_and_rows
    missing = [name for name in names if name not in state.tensors]
    if missing:
        raise WrongState(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    key, value = (state.tensors[name] for name in names)
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3] or key.dtype != value.dtype:
        raise WrongState(
            "key and value must agree in [B, H, rows] and dtype, "
            f"got {list(key.shape)} {key.dtype} and {list(value.shape)} {value.dtype}"
        )
    if rows is not None and key.shape[2] != rows:
        raise WrongState(f"it should have {rows} rows, its key has shape {list(key.shape)}")
    return key, value
