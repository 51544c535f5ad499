"""A padded batch: every sequence keeps the tokens that it would keep alone, and generates what it would alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)).eval().double()
ids = torch.randint(3, 64, (2, 200))
mask = torch.ones_like(ids)  # as tokenizer(texts, padding=True, padding_side="left") makes it:
mask[1, :110] = 0  # the second text has 90 tokens
batch, alone = (LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4) for _ in range(2))
options = {"max_new_tokens": 40, "pad_token_id": 0, "do_sample": False}
tokens = model.generate(ids, attention_mask=mask, cache=batch, **options)
short = model.generate(ids[1:, 110:], cache=alone, **options)
assert torch.equal(tokens[1, 110:], short[0])
assert torch.equal(batch.kept_positions(0, sequence=1), alone.kept_positions(0)[0])
print([batch.kept_positions(0, sequence=b).shape[1] for b in (0, 1)], "rows of", tokens.shape[1], "columns")
