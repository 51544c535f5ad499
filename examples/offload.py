"""Layers wait in the memory of the CPU while a device computes another one; without a device that is refused."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)).eval().to(device)
try:
    cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25, offloading=True)
except ValueError as reason:
    print(reason)
    cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25)
model.generate(torch.randint(3, 64, (1, 300), device=device), cache=cache, max_new_tokens=40)
print([layer.storages()[0].device.type for layer in cache.layers], cache.report(), sep="\n")
