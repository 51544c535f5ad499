"""The rows that stay are quantised: the same tokens are kept, in a fraction of the bytes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)).eval().bfloat16()
prompt = torch.randint(3, 64, (1, 2000))
for form in (None, "int8", "fp8", "int4"):
    cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4, quantization=form)
    with torch.no_grad():
        model(prompt, cache=cache)
    report = cache.report()
    print(f"{form}: {report.tokens_kept:.0f} of {report.tokens_seen} rows, {report.bytes_held:,} bytes")
