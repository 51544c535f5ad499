// Argument checks of compress_blocks, as checks.h has those of the other operators.
#pragma once

#include "blocks.h"
#include "method_checks.h"

namespace lagkv {

/// A pool of blocks in any strides. Devices take rows that are contiguous.
inline void check_pool(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 4 || x.dim() == 6, op, name,
        " must have 4 dimensions [blocks, block_size, H, D], or 6 [blocks, block_size / r, r, H, D / c, c], "
        "got shape ",
        ShapeText{x});
  check_dtype(op, name, x);
  if (!x.is_cpu()) {
    check(x.dim() == 4, op, name, " must have 4 dimensions [blocks, block_size, H, D] on ", DeviceText{x},
          ", got shape ", ShapeText{x});
    check_contiguous(op, name, x);
  }
  check_aligned(op, name, x);
}

/// The block size divides `size`; else names the nearest sizes that it divides. `ratio_of`: keep is also
/// named as a ratio of it, which the block size divides.
inline void check_divides(const char* op, const char* pool, int64_t block_size, const char* name,
                          int64_t size, int64_t ratio_of) {
  if (size % block_size == 0) return;
  std::ostringstream fits;
  const int64_t below = size / block_size * block_size;
  for (const int64_t near : {below, below + block_size}) {
    if (near == 0) continue;
    fits << (fits.tellp() > 0 ? " or " : "") << near;
    if (ratio_of > 0) fits << " (ratio " << static_cast<double>(near) / static_cast<double>(ratio_of) << ")";
  }
  check(false, op, "the block size of ", pool, " (", block_size, ") must divide ", name, ", got ", size, "; ",
        fits.str(), " would fit");
}

inline void check_block_sizes(const char* pool, int64_t block_size, int64_t sink_size, int64_t lag_size,
                              int64_t keep) {
  const char* op = "compress_blocks";
  check(sink_size >= 0, op, "sink_size must be at least 0, got ", sink_size);
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size);
  check(block_size >= 1, op, "the block size of ", pool, " must be at least 1, got ", block_size);
  check_divides(op, pool, block_size, "lag_size", lag_size, 0);
  check_divides(op, pool, block_size, "keep", keep, lag_size);
}

inline void check_block_tables(const Tensor& source_table, const Tensor& target_table, const Tensor& m_before,
                               const Tensor& m_after, int64_t block_size) {
  const char* op = "compress_blocks";
  struct Table {
    const char *name, *shape, *rows;
    const Tensor& x;
  };
  for (const Table& table :
       {Table{"source_table", "[B, max_source]", "source_table.size(1) * block_size", source_table},
        Table{"target_table", "[B, max_target]", "target_table.size(1) * block_size", target_table}}) {
    check(table.x.dim() == 2, op, table.name, " must have 2 dimensions ", table.shape, ", got shape ",
          ShapeText{table.x});
    check_int32(op, table.name, table.x);
    check_contiguous(op, table.name, table.x);
    check_capacity(op, table.x.size(1) * block_size, table.rows);
  }
  const int64_t batch = source_table.size(0);
  check(target_table.size(0) == batch, op, "target_table must have one row for each of ", batch,
        " sequences, got shape ", ShapeText{target_table});
  check_numbers(op, "m_before", m_before);
  check_count(op, "m_before", m_before, batch);
  check_numbers(op, "m_after", m_after);
  check_count(op, "m_after", m_after, batch);
}

inline Method check_compress_blocks(const Tensor& key_cache, const Tensor& value_cache,
                                    const Tensor& source_table, const Tensor& target_table,
                                    const Tensor& m_before, const Tensor& m_after, int64_t sink_size,
                                    int64_t lag_size, int64_t keep, const MethodArguments& arguments) {
  const char* op = "compress_blocks";
  check_pool(op, "key_cache", key_cache);
  check_pool(op, "value_cache", value_cache);
  check(value_cache.scalar_type() == key_cache.scalar_type(), op,
        "value_cache must have the dtype of key_cache (", DtypeText{key_cache}, "), got ",
        DtypeText{value_cache});
  check_device(op, "value_cache", value_cache, "key_cache", key_cache);
  const PoolSizes key = pool_sizes(key_cache), value = pool_sizes(value_cache);
  struct Size {
    const char* name;
    int64_t key, value;
  };
  for (const Size& size :
       {Size{"blocks", key.blocks, value.blocks}, Size{"block_size", key.block_size, value.block_size},
        Size{"heads", key.heads, value.heads}}) {
    check(size.key == size.value, op, "value_cache must agree with key_cache in ", size.name, " ",
          ShapeText{key_cache}, ", got shape ", ShapeText{value_cache});
  }
  check_block_sizes("key_cache", key.block_size, sink_size, lag_size, keep);
  check_block_tables(source_table, target_table, m_before, m_after, key.block_size);
  check_device(op, "source_table", source_table, "key_cache", key_cache);
  check_device(op, "target_table", target_table, "key_cache", key_cache);
  check_device(op, "m_before", m_before, "key_cache", key_cache);
  check_device(op, "m_after", m_after, "key_cache", key_cache);
  const Method method = check_scoring(op, arguments);
  check_overlap(op, {{"key_cache", &key_cache, true},
                     {"value_cache", &value_cache, true},
                     {"source_table", &source_table, false},
                     {"target_table", &target_table, false},
                     {"m_before", &m_before, false},
                     {"m_after", &m_after, false}});
  return method;
}

}  // namespace lagkv
