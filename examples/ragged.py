"""Continuous batching: slots of a fixed cache are filled, compressed and reused, each at its own pace."""

import torch

import lagkv_ext

torch.manual_seed(0)
key, value = torch.zeros(4, 8, 256, 64), torch.zeros(4, 8, 256, 64)  # [slots, H, capacity, D]
start, length = torch.full((4,), 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
slot, compressions = torch.arange(4), 0
for step in range(2000):  # a token a step in every slot; slot b goes to another request every 400 + 100 b
    begins = step % (400 + 100 * slot) == 0
    start[begins], length[begins] = 4, 0
    key[slot, :, length.long()], value[slot, :, length.long()] = torch.randn(2, 4, 8, 64)
    length += 1
    before = length.clone()
    lagkv_ext.compress_ragged_(key, value, start, length, lag_size=32, keep=8)
    compressions += int((length < before).sum())
print(f"{compressions} compressions; {length.tolist()} rows in slots of {key.shape[2]}")
