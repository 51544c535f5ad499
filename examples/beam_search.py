"""Beam search: every beam carries the compressed cache of its own history."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)).eval()
cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4)
options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 60, "do_sample": False}
model.generate(torch.randint(3, 64, (1, 300)), cache=cache, **options)
kept = cache.kept_positions(0)
print(f"{kept.shape[2]} rows in each of {kept.shape[0]} beams")
print(f"rows that all beams share: {int((kept == kept[:1]).all(dim=0).all(dim=0).sum())}")
