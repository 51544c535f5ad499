"""A long prefix is read once, saved, and continued several times: from the file, and from copies in memory."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2)).eval()
prefix, cache = torch.randint(3, 64, (1, 500)), LagKVCache(model.config, lag_size=16, keep_ratio=0.25)
model.generate(prefix, cache=cache, max_new_tokens=1)
path = tempfile.mkdtemp() + "/prefix.safetensors"
cache.save(path)
for question in torch.randint(3, 64, (3, 1, 20)):
    tokens = torch.cat([prefix, question], dim=1)
    for start in (cache.copy(), LagKVCache.load(path, model.config)):
        text = model.generate(tokens, cache=start, max_new_tokens=9, do_sample=False)
        print(text[0, -9:].tolist())
