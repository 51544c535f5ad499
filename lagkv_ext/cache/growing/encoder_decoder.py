"""The cache of an encoder-decoder model: self-attention of the decoder is compressed, cross-attention left alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.growing.cache import LagKVCache
from lagkv_ext.cache.report import CacheReport


class _SelfAttentionCache(LagKVCache):
    """By itself it must not be given to such a model, whose cross-attention would write into it too."""

    _part_of_encoder_decoder = True

    def _check_can_be_stored(self) -> None:
        raise ValueError(
            "the cache of an encoder-decoder model cannot be saved: half of it belongs to the encoder's input; "
            "keep a copy.deepcopy of it"
        )


class LagKVEncoderDecoderCache(EncoderDecoderCache):
    """`LagKVCache` for encoder-decoder models: ``generate(..., cache=LagKVEncoderDecoderCache(config))``.

    The tokens that the decoder writes are compressed as they come; the encoder's keys and values, which
    cross-attention reads in every step, are as they are without it. ``self_attention_cache`` is the `LagKVCache`.

    Args:
        config: ``model.config`` of an encoder-decoder model whose positions count tokens (BART, mBART, Marian, Pegasus,
            Whisper).
        settings: keyword arguments of `LagKVCache`.

    Raises:
        TypeError, ValueError: a wrong argument, or a model that it does not serve, with the reason: T5 and its
            relatives bias attention by row numbers, which no longer are positions once tokens were dropped.
    """

    def __init__(self, config: PreTrainedConfig, **settings: Any):
        self._compressed = _SelfAttentionCache(config, **settings)
        super().__init__(self._compressed, DynamicCache(config=config.get_text_config(decoder=True)))

    def report(self) -> CacheReport:
        """Reports what the self-attention layers hold; see `LagKVCache.report`."""
        return self._compressed.report()

    def kept_hash(self) -> str:
        return self._compressed.kept_hash()

    @property
    def timer(self) -> CompressionTimer | None:
        return self._compressed.timer

    @timer.setter
    def timer(self, timer: CompressionTimer | None) -> None:
        self._compressed.timer = timer
