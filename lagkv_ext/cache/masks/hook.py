"""The hook into the mask functions of transformers, by which a cache sees and makes attention masks.

transformers 5 makes masks in ``masking_utils``: ``create_causal_mask`` (and its siblings for windows and chunks) asks
the cache for sizes, ``kv_length, kv_offset = cache.get_mask_sizes(query_length, layer)``, and then calls the mask
function of the attention implementation ("sdpa", "eager", ...), found in the registry `AttentionMaskInterface`, with
``kv_length`` and the model's 2-D attention mask. It never shows a cache the attention mask.

So a cache answers `get_mask_sizes` with an `AskedLength`, an int that says who was asked, and the registered mask
functions are replaced by ones that return to that cache, with the mask function and its arguments. They do nothing
else: a plain int, from any other cache, goes straight to the mask function. Both ends are public: the return value of a
method of the cache, and ``AttentionMaskInterface.register``.

Nothing is guessed where a link is missing (a mask function outside of the registry, a 4-D mask of the model's caller, a
number that somebody made of the `AskedLength`): the mask then was not seen, and the cache refuses the step until
`set_attention_mask` tells it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

MaskFunction = Callable[..., Any]


class MakesMasks(Protocol):
    """A cache that makes masks itself."""

    def make_mask(self, layer: int, new: int, function: MaskFunction, arguments: dict[str, Any]) -> Any:
        """The mask of a step of ``new`` tokens for a layer: ``function(**arguments)``, after what has to be seen in
        the arguments, and with what has to be changed in them."""


class AskedLength(int):
    """Columns of a mask, for a step of ``new`` tokens, as `get_mask_sizes` of ``cache`` answered for ``layer``."""

    cache: MakesMasks
    layer: int
    new: int

    @classmethod
    def of(cls, columns: int, cache: MakesMasks, layer: int, new: int) -> AskedLength:
        length = cls(columns)
        length.cache, length.layer, length.new = cache, layer, new
        return length


class _Traced:
    """The cache that was asked last in a traced region, where no `AskedLength` can be made."""

    def __init__(self) -> None:
        self.cache: Any = None


_traced = _Traced()


def asked_while_tracing(cache: Any) -> None:
    """Say that ``cache`` answers `get_mask_sizes` in a traced region with a plain number; None: that this is over."""
    _traced.cache = cache


def install() -> None:
    """Replace every mask function of the registry, those registered since the last call included."""
    for name in list(ALL_MASK_ATTENTION_FUNCTIONS):
        function = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if getattr(function, "returns_to_cache", False):
            continue
        AttentionMaskInterface.register(name, _returning(function))
        if not getattr(ALL_MASK_ATTENTION_FUNCTIONS[name], "returns_to_cache", False):
            # Somebody has set one on the shared instance, where it goes before those of the class.
            ALL_MASK_ATTENTION_FUNCTIONS[name] = _returning(function)


def _returning(function: MaskFunction) -> MaskFunction:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("kv_length")
        if isinstance(asked, AskedLength):
            return _return_to_cache(asked, function, kwargs)
        if torch.compiler.is_compiling():
            cache, _traced.cache = _traced.cache, None
            if cache is not None:
                cache.check_traced_mask(kwargs.get("attention_mask"))
        return function(*args, **kwargs)

    make.returns_to_cache = True  # type: ignore[attr-defined]
    return make


@torch.compiler.disable
def _return_to_cache(asked: AskedLength, function: MaskFunction, arguments: dict[str, Any]) -> Any:
    arguments = {**arguments, "kv_length": int(asked)}
    return asked.cache.make_mask(asked.layer, asked.new, function, arguments)


def with_padding(arguments: dict[str, Any], visible: Tensor) -> dict[str, Any]:
    """The arguments of a mask function with ``visible [B, columns]`` as the columns that all its tokens may see."""
    mask = visible.to(arguments["device"])
    hidden = mask.new_ones(mask.shape[0], int(arguments["kv_offset"]))
    return {**arguments, "attention_mask": torch.cat([hidden, mask], dim=1)}
