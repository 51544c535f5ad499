"""Endless generation in bounded memory: no layer ever holds more rows than ``max_tokens``."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4, max_tokens=64)
tokens = torch.randint(0, 64, (1, 500))
for _ in range(3):
    tokens = model.generate(tokens, cache=cache, max_new_tokens=200, eos_token_id=None)
    report = cache.report()
    print(
        f"{report.tokens_seen} tokens seen, {report.tokens_kept:.0f} rows, {report.bytes_held:,} bytes held"
    )
    assert all(layer.tokens_kept < 64 for layer in report.layers)
