// Argument checks of the ragged operators, shared by the backends: all that can be seen without reading a
// value. lagkv_ext/checks_ragged.py has the same for tracing, and the checks of values.
#pragma once

#include "checks.h"
#include "ragged.h"

namespace lagkv {

/// How the rows of an operator's key and value are laid out: what the messages call the dimensions.
struct RowsLayout {
  const char *key, *value;
  int64_t rank;
  const char* shape;
  const char* dims[3];  // all but the last
};

constexpr RowsLayout kSlots = {"key", "value", 4, "[B, H, capacity, D]", {"batch", "heads", "capacity"}};
constexpr RowsLayout kPacked = {"key", "value", 3, "[T, H, D]", {"rows", "heads", nullptr}};
constexpr RowsLayout kPages = {
    "key_cache", "value_cache", 4, "[blocks, block_size, H, D]", {"blocks", "block_size", "heads"}};

inline void check_ragged_rows(const char* op, const RowsLayout& layout, const char* name, const Tensor& x) {
  check(x.dim() == layout.rank, op, name, " must have ", layout.rank, " dimensions ", layout.shape,
        ", got shape ", shape_text(x));
  check_dtype(op, name, x);
  check(x.stride(layout.rank - 1) == 1 || x.size(layout.rank - 1) <= 1 || x.numel() == 0, op, name,
        " must have a contiguous last dimension (stride 1), got stride ", x.stride(layout.rank - 1));
  check_aligned(op, name, x);
}

inline void check_ragged_pair(const char* op, const RowsLayout& layout, const Tensor& key,
                              const Tensor& value) {
  check_ragged_rows(op, layout, layout.key, key);
  check_ragged_rows(op, layout, layout.value, value);
  check(value.scalar_type() == key.scalar_type(), op, layout.value, " must have the dtype of ", layout.key,
        " (", dtype_text(key), "), got ", dtype_text(value));
  check(value.device() == key.device(), op, layout.value, " must be on the device of ", layout.key, " (",
        device_text(key), "), got ", device_text(value));
  for (int64_t dim = 0; dim + 1 < layout.rank; ++dim) {
    check(value.size(dim) == key.size(dim), op, layout.value, " must agree with ", layout.key, " in ",
          layout.dims[dim], " ", shape_text(key), ", got shape ", shape_text(value));
  }
}

/// start, length, cu_seqlens: int32, contiguous, one number a sequence (and one more).
inline void check_numbers(const char* op, const RowsLayout& layout, const Tensor& key, const char* name,
                          const Tensor& x) {
  check(x.dim() == 1, op, name, " must have 1 dimension, got shape ", shape_text(x));
  check(x.scalar_type() == ScalarType::Int, op, name, " must be int32, got ", dtype_text(x));
  check(x.device() == key.device(), op, name, " must be on the device of ", layout.key, " (",
        device_text(key), "), got ", device_text(x));
  check(x.stride(0) == 1 || x.size(0) <= 1, op, name, " must be contiguous, got stride ", x.stride(0));
}

inline void check_count(const char* op, const char* name, const Tensor& x, int64_t batch) {
  check(x.size(0) == batch, op, name, " must have one number for each of ", batch, " sequences, got shape ",
        shape_text(x));
}

inline void check_capacity(const char* op, int64_t capacity, const char* of) {
  check(capacity <= kMaxLength, op, of, " must come to at most ", kMaxLength, " tokens, got ", capacity);
}

inline void check_start_and_length(const char* op, const RowsLayout& layout, const Tensor& key,
                                   const Tensor& start, const Tensor& length, int64_t batch) {
  check_numbers(op, layout, key, "start", start);
  check_count(op, "start", start, batch);
  check_numbers(op, layout, key, "length", length);
  check_count(op, "length", length, batch);
}

inline Score check_compress_ragged_(const Tensor& key, const Tensor& value, const Tensor& start,
                                    const Tensor& length, int64_t lag_size, int64_t keep, double value_weight,
                                    const std::string& score) {
  const char* op = "compress_ragged_";
  check_ragged_pair(op, kSlots, key, value);
  check_capacity(op, key.size(2), "capacity");
  check_start_and_length(op, kSlots, key, start, length, key.size(0));
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size);
  const Score kind = check_scoring(op, value_weight, score);
  check_overlap(
      op, {{"key", key, true}, {"value", value, true}, {"start", start, true}, {"length", length, true}});
  return kind;
}

inline Score check_compress_varlen(const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
                                   const Tensor& start, int64_t lag_size, int64_t keep, double value_weight,
                                   const std::string& score) {
  const char* op = "compress_varlen";
  check_ragged_pair(op, kPacked, key, value);
  check_capacity(op, key.size(0), "rows");
  check_numbers(op, kPacked, key, "cu_seqlens", cu_seqlens);
  check(cu_seqlens.size(0) >= 1, op, "cu_seqlens must have at least 1 number (B + 1 of them), got shape ",
        shape_text(cu_seqlens));
  check_numbers(op, kPacked, key, "start", start);
  check_count(op, "start", start, cu_seqlens.size(0) - 1);
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size);
  return check_scoring(op, value_weight, score);
}

inline Score check_compress_paged_(const Tensor& key_cache, const Tensor& value_cache,
                                   const Tensor& block_table, const Tensor& start, const Tensor& length,
                                   int64_t lag_size, int64_t keep, double value_weight,
                                   const std::string& score) {
  const char* op = "compress_paged_";
  check_ragged_pair(op, kPages, key_cache, value_cache);
  check(block_table.dim() == 2, op, "block_table must have 2 dimensions [B, max_blocks], got shape ",
        shape_text(block_table));
  check(block_table.scalar_type() == ScalarType::Int, op, "block_table must be int32, got ",
        dtype_text(block_table));
  check(block_table.device() == key_cache.device(), op, "block_table must be on the device of key_cache (",
        device_text(key_cache), "), got ", device_text(block_table));
  check(block_table.stride(1) == 1 || block_table.size(1) <= 1 || block_table.numel() == 0, op,
        "block_table must have a contiguous last dimension (stride 1), got stride ", block_table.stride(1));
  check_capacity(op, block_table.size(1) * key_cache.size(1), "block_table.size(1) * block_size");
  check_start_and_length(op, kPages, key_cache, start, length, block_table.size(0));
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size);
  const Score kind = check_scoring(op, value_weight, score);
  check_overlap(op, {{"key_cache", key_cache, true},
                     {"value_cache", value_cache, true},
                     {"block_table", block_table, false},
                     {"start", start, true},
                     {"length", length, true}});
  return kind;
}

}  // namespace lagkv
