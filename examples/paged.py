"""A paged cache, laid out as vLLM does: compressed in place, the blocks that come free go back to the pool."""

import torch

import lagkv_ext

torch.manual_seed(0)
kv = torch.randn(2, 160, 16, 8, 64)  # vLLM: [2, blocks, block_size, H, D]; FlashInfer: kv[:, 0], kv[:, 1]
lengths, free = torch.tensor([1000, 90, 700], dtype=torch.int32), list(range(160))
table = torch.full((3, 64), -1, dtype=torch.int32)  # the blocks of every sequence, in order
for b in range(3):
    blocks = -(-int(lengths[b]) // 16)
    table[b, :blocks] = torch.tensor([free.pop() for _ in range(blocks)])
start, length = torch.full((3,), 16, dtype=torch.int32), lengths.clone()
lagkv_ext.compress_paged_(kv[0], kv[1], table, start, length, lag_size=128, keep_ratio=0.25)
for b in range(3):
    freed = table[b, -(-int(length[b]) // 16) : -(-int(lengths[b]) // 16)].tolist()
    free += freed
    print(f"sequence {b}: {lengths[b]} tokens are now {length[b]} rows; {len(freed)} blocks freed")
print(f"{len(free)} of {kv.shape[1]} blocks are free")
