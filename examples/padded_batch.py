"""A padded batch: every sequence keeps the tokens that it would keep alone, and generates what it would alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lagkv_ext import LagKVCache

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)).eval().double()
prompts = [torch.randint(3, 64, (n,)) for n in (200, 90)]
ids = torch.zeros(
    2, 200, dtype=torch.long
)  # as tokenizer(texts, padding=True, padding_side="left") makes them
for row, text in zip(ids, prompts, strict=True):
    row[200 - len(text) :] = text
batch, alone = (LagKVCache(model.config, lag_size=16, keep_ratio=0.25, sink_size=4) for _ in range(2))
tokens = model.generate(ids, attention_mask=(ids != 0).long(), past_key_values=batch, max_new_tokens=40)
short = model.generate(prompts[1][None], past_key_values=alone, max_new_tokens=40)
assert torch.equal(tokens[1, 200:], short[0, 90:])
assert torch.equal(batch.kept_positions(0, sequence=1), alone.kept_positions(0)[0])
print([batch.kept_positions(0, sequence=b).shape[1] for b in (0, 1)], "rows of", tokens.shape[1], "columns")
