"""Assisted decoding: a small model drafts, rejected tokens never decide what is kept."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
model, draft = (
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n, eos_token_id=None)).eval() for n in (4, 1)
)
prompt = torch.randint(3, 64, (1, 300))
for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
    cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4)
    tokens = model.generate(prompt, cache=cache, max_new_tokens=60, do_sample=False, **options)
    report = cache.report()
    print(f"{tokens.shape[1]} tokens, {report.tokens_kept:.0f} rows, {report.compressions} compressions")
