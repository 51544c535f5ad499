"""A tiny model and how it is called: every family with the arguments that its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from lagkv_ext import LagKVCache, LagKVEncoderDecoderCache, LagKVStaticCache
from tests.sweep.families import Case
from tests.sweep.tiny import VOCABULARY


class NothingToCompare(Exception):
    """A family does not do this with transformers' own cache either."""


class Subject:
    """A decoder. Caches are what `compressed` and `uncompressed` make, and copies of them."""

    _names = ("input_ids", "attention_mask", "position_ids")

    def __init__(self, model: Any, case: Case):
        self.model, self.config, self.rows_before = model, model.config, case.rows_before
        self._case = case
        self._parameters = inspect.signature(model.forward).parameters
        # transformers 5.23 renamed it; xlm has had a dictionary of that name since long before.
        names = [x for x in ("cache", "past_key_values") if x in self._parameters]
        if not names:
            raise NothingToCompare(f"forward of {type(model).__name__} takes no cache")
        self._cache_name = names[0]

    @property
    def takes_positions(self) -> bool:
        return self._names[2] in self._parameters and not self._case.all_tokens

    def compressed(self, **settings: Any) -> LagKVCache:
        return LagKVCache(self.config, **settings)

    def uncompressed(self) -> DynamicCache:
        return DynamicCache(config=self.config)

    def fixed(self, **settings: Any) -> LagKVStaticCache:
        return LagKVStaticCache(self.config, **settings)

    def tokens(self, count: int, batch: int = 1) -> Tensor:
        """Random tokens, none of them special."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, VOCABULARY - 1, (batch, count), generator=generator)

    @torch.no_grad()
    def forward(
        self,
        cache: Any,
        ids: Tensor,
        chunks: list[int],
        mask: Tensor | Callable[[int, int], Tensor] | None = None,
        seen: int = 0,
    ) -> Tensor:
        """Logits ``[B, tokens, V]`` of the tokens in ``chunks``, the first of which follows on ``seen`` tokens.

        ``mask``: ``[B, tokens]`` of a padded batch, or a function of where a step begins and ends. Positions count what
        a padded batch does not hide, otherwise all tokens.
        """
        tokens_name, mask_name, positions_name = self._names
        logits = []
        for new in chunks:
            end = seen + new
            arguments = {self._cache_name: self._whole(cache), "use_cache": True}
            arguments[tokens_name] = ids[:, 0 if self._case.all_tokens else seen : end]
            if mask is not None:
                if mask_name not in self._parameters:
                    raise NothingToCompare(f"forward takes no {mask_name}")
                arguments[mask_name] = mask(seen, end) if callable(mask) else mask[:, :end]
            if self.takes_positions:
                counted = mask if isinstance(mask, Tensor) else torch.ones_like(ids)
                arguments[positions_name] = (counted[:, :end].cumsum(1) - 1).clamp(min=0)[:, seen:]
            arguments |= self._others(ids.shape[0], first=seen == 0)
            logits.append(self.model(**arguments).logits[:, -new:])
            seen = end
        return torch.cat(logits, dim=1)

    def generate(self, cache: Any, ids: Tensor, new: int) -> Tensor:
        """``ids`` and the ``new`` most probable tokens after them."""
        arguments = {
            self._cache_name: self._whole(cache),
            self._names[0]: ids,
            self._names[1]: torch.ones_like(ids),
        }
        arguments |= self._others(ids.shape[0], first=True)
        return self.model.generate(max_new_tokens=new, min_new_tokens=new, do_sample=False, **arguments)

    def _whole(self, cache: Any) -> Any:
        """Cache argument of the model."""
        return cache

    def _others(self, batch: int, first: bool) -> dict[str, Any]:
        """The arguments of a step beyond tokens."""
        makers = {**self._case.every_step, **(self._case.first_step if first else {})}
        return {name: make(batch).to(self.model.dtype) for name, make in makers.items()}


class EncoderDecoderSubject(Subject):
    """A model of two parts. Its caches are those of the decoder's self-attention, each of which knows the whole."""

    _names = ("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids")

    def compressed(self, **settings: Any) -> Any:
        return self._part(LagKVEncoderDecoderCache(self.config, **settings))

    def uncompressed(self) -> Any:
        config = self.config.get_text_config(decoder=True)
        return self._part(EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)))

    def fixed(self, **settings: Any) -> LagKVStaticCache:
        raise NothingToCompare("LagKVStaticCache is for decoders")

    @staticmethod
    def _part(whole: EncoderDecoderCache) -> Any:
        part: Any = whole.self_attention_cache
        part.whole = whole
        return part

    def _whole(self, cache: Any) -> Any:
        return None if cache is None else cache.whole

    def _others(self, batch: int, first: bool) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        if self.model.main_input_name == "input_ids":
            return {"input_ids": torch.randint(3, VOCABULARY - 1, (batch, 9), generator=generator)}
        sound = torch.randn(
            batch, self.config.num_mel_bins, 2 * self.config.max_source_positions, generator=generator
        )
        return {self.model.main_input_name: sound.to(self.model.dtype)}


def subject_of(model: Any, case: Case) -> Subject:
    return (EncoderDecoderSubject if case.encoder_decoder else Subject)(model, case)
