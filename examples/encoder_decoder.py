"""An encoder-decoder model: the decoder's own tokens are compressed, cross-attention is left alone."""

import torch
from transformers import BartConfig, BartForConditionalGeneration

from lagkv_ext import LagKVEncoderDecoderCache

model = BartForConditionalGeneration(
    BartConfig(vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=2)
)
cache = LagKVEncoderDecoderCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4)
options = {"max_new_tokens": 300, "min_new_tokens": 300, "num_beams": 1, "do_sample": False}
model.eval().generate(torch.randint(3, 64, (1, 100)), cache=cache, **options)
print(cache.report())
print("rows of the encoder:", cache.cross_attention_cache.layers[0].keys.shape[2])
