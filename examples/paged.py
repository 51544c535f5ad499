"""A paged cache, laid out as vLLM does: compressed in place, the blocks that come free go back to the pool."""

import torch

import lagkv_ext

torch.manual_seed(0)
kv = torch.randn(
    2, 160, 16, 8, 64
)  # vLLM's [2, blocks, block_size, H, D]; of FlashInfer's: kv[:, 0], kv[:, 1]
lengths, free = [1000, 90, 700], list(range(160))
table = torch.full((3, 64), -1, dtype=torch.int32)  # the blocks of every sequence, in order
for b, tokens in enumerate(lengths):
    blocks = -(-tokens // 16)
    table[b, :blocks] = torch.tensor([free.pop() for _ in range(blocks)])
start, length = torch.tensor([16, 16, 16], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
lagkv_ext.compress_paged_(kv[0], kv[1], table, start, length, lag_size=128, keep_ratio=0.25)
for b, tokens in enumerate(lengths):
    freed = table[b, -(-int(length[b]) // 16) : -(-tokens // 16)].tolist()
    free += freed
    print(f"sequence {b}: {tokens} tokens are now {length[b]} rows; {len(freed)} blocks freed")
print(f"{len(free)} of {kv.shape[1]} blocks are free")
