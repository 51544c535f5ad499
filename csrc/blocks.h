// Parameters of compress_blocks: partitions of raw rows in blocks of a pool, compressed to other blocks of
// it. No torch, no CUDA runtime.
#pragma once

#include "params.h"

namespace lagkv {

/// The partitions m_before .. m_after - 1 of one sequence, and the mixed block behind their kept rows. Where
/// numbers are invalid there are no partitions: the CPU has refused them before, a device finds out in its
/// kernels.
struct BlocksSequence {
  bool valid;
  int64_t partitions;  // to compress; where there are none, nothing is written
  int64_t first;       // token with which the first of them begins
  int64_t window;      // token behind the last of them
  int64_t kept;        // rows that are kept of them
  int64_t mixed;       // rows of the mixed block: block_size where the sink ends inside a block, else 0

  LAGKV_HOST_DEVICE int64_t rows() const { return kept + mixed; }
};

/// The arguments of compress_blocks. Source and target are rows of the same tensors, by their own tables.
///
/// Target row i of a sequence, in its target blocks: first `keep` rows of each partition, then the mixed
/// block, the last `sink % block_size` rows of the sink and the tokens from the window on.
template <class T>
struct BlocksParams {
  Rows<const T> key, value;           // pages by source_table [B, max_source], in which a token is a row
  Rows<T> key_out, value_out;         // pages by target_table [B, max_target]
  const int32_t *m_before, *m_after;  // [B]
  int32_t* index;  // [B, H, capacity] contiguous: token of every target row, -1 behind them
  int64_t batch, heads;
  int64_t tokens, capacity;  // rows that the tables of one sequence have room for: source, target
  int64_t blocks;            // pages in the pool; tables must stay in 0 .. blocks - 1
  int64_t sink, lag_size, keep;
  Method method;

  /// Rows of the sink in its last block, where that is not full.
  LAGKV_HOST_DEVICE int64_t part() const { return sink % key.block_size; }

  LAGKV_ANY_LOAD template <class Load = PlainLoad>
  LAGKV_HOST_DEVICE BlocksSequence sequence(int64_t b, const Load& load = {}) const {
    const int64_t before = load(m_before + b), after = load(m_after + b);
    const int64_t mixed = part() > 0 ? key.block_size : 0;
    const int64_t most = (tokens - sink) / lag_size - 1;  // one is only looked at
    if (before < 0 || after < before) return {false, 0, 0, 0, 0, 0};
    if (after == before) return {true, 0, 0, 0, 0, 0};
    if (after > most || after - before > (capacity - mixed) / keep) return {false, 0, 0, 0, 0, 0};
    return {true, after - before, sink + before * lag_size, sink + after * lag_size, (after - before) * keep,
            mixed};
  }
};

/// Sizes of a pool, in which both of a block's dimensions may be split: [blocks, block_size, H, D] or
/// [blocks, block_size / r, r, H, D / c, c].
struct PoolSizes {
  int64_t blocks, block_size, heads, dim;
};

template <class Tensor>
PoolSizes pool_sizes(const Tensor& x) {
  const auto& sizes = x.sizes();
  if (sizes.size() == 4) return {sizes[0], sizes[1], sizes[2], sizes[3]};
  return {sizes[0], sizes[1] * sizes[2], sizes[3], sizes[4] * sizes[5]};
}

/// The rows of a pool by a block table.
template <class T, class Tensor>
Rows<T> block_rows(const Tensor& x, const Tensor& table) {
  const PoolSizes pool = pool_sizes(x);
  const bool split = x.sizes().size() == 6;
  Rows<T> rows{static_cast<T*>(x.data_ptr()),
               step_of(x, 0),
               step_of(x, split ? 3 : 2),
               step_of(x, 1),
               pool.dim,
               nullptr,
               static_cast<const int32_t*>(table.data_ptr()),
               step_of(table, 0),
               pool.block_size};
  if (split) {
    rows.tiling = {x.sizes()[2], step_of(x, 2), x.sizes()[5], step_of(x, 4), step_of(x, 5)};
  } else if (pool.dim > 1 && x.strides()[3] != 1) {
    rows.tiling = {1, 0, 1, x.strides()[3], 0};
  }
  return rows;
}

template <class T, class Tensor>
BlocksParams<T> block_params(const Tensor& key_cache, const Tensor& value_cache, const Tensor& source_table,
                             const Tensor& target_table, const Tensor& m_before, const Tensor& m_after,
                             const Tensor& index, int64_t sink, int64_t lag_size, int64_t keep,
                             const Method& method) {
  const PoolSizes pool = pool_sizes(key_cache);
  return {block_rows<const T>(key_cache, source_table),
          block_rows<const T>(value_cache, source_table),
          block_rows<T>(key_cache, target_table),
          block_rows<T>(value_cache, target_table),
          static_cast<const int32_t*>(m_before.data_ptr()),
          static_cast<const int32_t*>(m_after.data_ptr()),
          static_cast<int32_t*>(index.data_ptr()),
          source_table.size(0),
          pool.heads,
          source_table.size(1) * pool.block_size,
          target_table.size(1) * pool.block_size,
          pool.blocks,
          sink,
          lag_size,
          keep,
          method};
}

}  // namespace lagkv
