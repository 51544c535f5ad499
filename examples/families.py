"""Hybrid models: full-attention layers are compressed, others keep what transformers gives them."""

import torch
import transformers

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
for name, kinds in (
    ("Gemma3", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8}),
):
    model = getattr(transformers, f"{name}ForCausalLM")
    model = model(model.config_class(**sizes, **kinds)).eval()
    cache = LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4)
    model.generate(torch.randint(3, 64, (1, 300)), cache=cache, max_new_tokens=20)
    print(name, cache.report(), sep="\n")
