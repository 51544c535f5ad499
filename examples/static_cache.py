"""A decode step compiled once, over a cache that never moves: it fills, compresses, and starts again from the sink."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVStaticCache

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(config).eval()
cache = LagKVStaticCache(model.config, capacity=64, lag_size=16, keep_ratio=0.25, sink_size=4)
step = torch.compile(model, fullgraph=True, backend="eager")  # the default runs faster
with torch.no_grad():
    logits = model(torch.randint(0, 64, (1, 100)), cache=cache).logits  # the prompt, as it comes
    for _ in range(500):
        logits = step(logits[:, -1:].argmax(dim=-1), cache=cache).logits
print(cache.report())
