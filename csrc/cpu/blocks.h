// compress_blocks on the CPU: the checks of its numbers, before anything is written, and its batch for the
// driver.
#pragma once

#include <algorithm>
#include <vector>

#include "../blocks.h"
#include "batch.h"
#include "values.h"

namespace lagkv::cpu {

/// The block tables and numbers of a call.
struct BlocksTables {
  const int32_t *source, *target;        // [B, max_source], [B, max_target]
  int64_t source_stride, target_stride;  // of a sequence
  const int32_t *m_before, *m_after;     // [B]
  int64_t batch, tokens, capacity;       // rows that the tables of one sequence have room for: source, target
  int64_t blocks, block_size;
  int64_t sink, lag_size, keep;
};

/// Every number fits its tables, every block in use is in the pool, and a block that is written is in use
/// once.
inline void check_blocks_values(const BlocksTables& p) {
  const char* op = "compress_blocks";
  struct Use {
    int32_t block;
    bool written;
    int64_t b, entry;
    const char* table() const { return written ? "target_table" : "source_table"; }
  };
  std::vector<Use> uses;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t before = p.m_before[b], after = p.m_after[b], part = p.sink % p.block_size;
    check(before >= 0, op, "m_before must be at least 0, got ", before, " for sequence ", b);
    check(after >= before, op, "m_after must be at least m_before (", before, "), got ", after,
          " for sequence ", b);
    if (after == before) continue;
    const int64_t needed = p.sink + (after + 1) * p.lag_size;
    check(needed <= p.tokens, op, "source_table must have room for the ", needed,
          " tokens up to the partition behind m_after (", after, "), got room for ", p.tokens,
          ", for sequence ", b);
    const int64_t rows = (after - before) * p.keep + (part > 0 ? p.block_size : 0);
    check(rows <= p.capacity, op, "target_table must have room for ", rows, " rows, got room for ",
          p.capacity, ", for sequence ", b);
    const auto use = [&](const int32_t* table, int64_t stride, int64_t entry, bool written) {
      const Use one{table[b * stride + entry], written, b, entry};
      check(one.block >= 0 && one.block < p.blocks, op, one.table(), " must hold blocks between 0 and ",
            p.blocks - 1, ", got ", one.block, " at [", b, ", ", entry, "]");
      uses.push_back(one);
    };
    const int64_t first = (p.sink + before * p.lag_size) / p.block_size;
    for (int64_t i = first; i * p.block_size < needed; ++i) use(p.source, p.source_stride, i, false);
    if (part > 0 && before > 0) use(p.source, p.source_stride, p.sink / p.block_size, false);
    for (int64_t i = 0; i * p.block_size < rows; ++i) use(p.target, p.target_stride, i, true);
  }
  std::stable_sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) {
    return a.block != b.block ? a.block < b.block : a.written > b.written;  // what is written comes first
  });
  for (size_t i = 1; i < uses.size(); ++i) {
    const Use &one = uses[i - 1], &other = uses[i];
    check(one.block != other.block || !one.written, op,
          "target_table must hold blocks that are in use once, got block ", one.block, " at [", one.b, ", ",
          one.entry, "] and in ", other.table(), " at [", other.b, ", ", other.entry, "]");
  }
}

/// Numbers must have been checked.
template <class T>
Batch<T> blocks_batch(const BlocksParams<T>& p) {
  Batch<T> batch{p.key,      p.value,    p.key_out, p.value_out, {}, p.heads,
                 p.capacity, p.lag_size, p.keep,    p.method,    {}};
  batch.sequences.reserve(static_cast<size_t>(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    const BlocksSequence s = p.sequence(b);
    const int64_t part = s.mixed > 0 ? p.part() : 0;
    batch.sequences.push_back({s.first,
                               0,
                               s.first,
                               s.partitions,
                               {p.sink - part, s.kept, part},
                               {s.window, s.kept + part, s.mixed - part},
                               p.index + b * p.heads * p.capacity,
                               p.capacity});
  }
  return batch;
}

}  // namespace lagkv::cpu
