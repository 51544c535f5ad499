// Argument checks of the operators, the same for every backend: all that can be seen without reading a
// tensor's elements. They come before any write. lagkv_ext/fake.py repeats what decides an output's shape.
#pragma once

#include "argument_checks.h"
#include "method_checks.h"

namespace lagkv {

inline Method check_compress(const char* op, const Tensor& key, const Tensor& value, int64_t start,
                             int64_t lag_size, int64_t keep, const MethodArguments& arguments) {
  check_dense_pair(op, key, value);
  check_start(op, start);
  return check_method(op, lag_size, keep, arguments);
}

inline Method check_compress_carried(const Tensor& key, const Tensor& value, const Tensor& carried,
                                     int64_t start, int64_t lag_size, int64_t keep,
                                     const MethodArguments& arguments) {
  const char* op = "compress_carried";
  const Method method = check_compress(op, key, value, start, lag_size, keep, arguments);
  check_carried(op, key, carried, start);
  return method;
}

inline Method check_compress_(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size,
                              int64_t keep, const MethodArguments& arguments,
                              const std::optional<Tensor>& scores, int64_t sink_size) {
  const char* op = "compress_";
  const Method method = check_compress(op, key, value, start, lag_size, keep, arguments);
  check_scores(op, kDense, key, scores, sink_size, method);
  check(sink_size <= start, op, "sink_size must be at most start (", start, "), got ", sink_size);
  check_overlap(op, {{"key", &key, true}, {"value", &value, true}, {"scores", given(scores), true}});
  return method;
}

inline void check_partition_bounds(const Tensor& x, int64_t start, int64_t lag_size) {
  const char* op = "partition_bounds";
  check_dense(op, "x", x);
  check_start(op, start);
  check_lag_size(op, lag_size);
}

inline Method check_lag_score(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size,
                              const MethodArguments& arguments) {
  const char* op = "lag_score";
  check_dense_pair(op, key, value);
  check_start(op, start);
  check_lag_size(op, lag_size);
  return check_scoring(op, arguments);
}

inline void check_topk_index(const Tensor& score, int64_t keep) {
  const char* op = "topk_index";
  check(score.dim() >= 1, op, "score must have at least 1 dimension [..., L], got a scalar");
  check_dtype(op, "score", score);
  const int64_t columns = score.size(score.dim() - 1);
  check(columns <= kMaxLength, op, "score must have at most ", kMaxLength, " columns, got ", columns);
  check_keep(op, keep, "the last dimension of score", columns);
  check_contiguous(op, "score", score);
  check_aligned(op, "score", score);
}

/// All but the values of index, which only a backend that can read them can check.
inline void check_compact(const Tensor& x, const Tensor& index) {
  const char* op = "compact";
  check_dense(op, "x", x);
  check(index.dim() == 3, op, "index must have 3 dimensions [B, H, K], got shape ", ShapeText{index});
  check_int32(op, "index", index);
  check_device(op, "index", index, "x", x);
  check(index.size(0) == x.size(0) && index.size(1) == x.size(1), op,
        "index must agree with x in batch and heads ", ShapeText{x}, ", got shape ", ShapeText{index});
  check(index.size(2) <= kMaxLength, op, "index must have at most ", kMaxLength, " columns, got ",
        index.size(2));
}

inline Method check_compress_ragged_(const Tensor& key, const Tensor& value, const Tensor& start,
                                     const Tensor& length, int64_t lag_size, int64_t keep,
                                     const MethodArguments& arguments, const std::optional<Tensor>& scores,
                                     int64_t sink_size) {
  const char* op = "compress_ragged_";
  check_pair(op, kSlots, key, value);
  check_capacity(op, key.size(2), "capacity");
  check_start_and_length(op, start, length, key.size(0));
  check_device(op, "start", start, "key", key);
  check_device(op, "length", length, "key", key);
  // With carried scores 0 says: as many rows as before.
  const Method method = check_method(op, lag_size, keep, arguments, scores ? 0 : 1);
  check_scores(op, kSlots, key, scores, sink_size, method);
  check_overlap(op, {{"key", &key, true},
                     {"value", &value, true},
                     {"start", &start, true},
                     {"length", &length, true},
                     {"scores", given(scores), true}});
  return method;
}

inline Method check_compress_varlen(const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
                                    const Tensor& start, int64_t lag_size, int64_t keep,
                                    const MethodArguments& arguments) {
  const char* op = "compress_varlen";
  check_pair(op, kPacked, key, value);
  check_capacity(op, key.size(0), "rows");
  check_cu_seqlens_and_start(op, cu_seqlens, start);
  check_device(op, "cu_seqlens", cu_seqlens, "key", key);
  check_device(op, "start", start, "key", key);
  return check_method(op, lag_size, keep, arguments);
}

inline Method check_compress_paged_(const Tensor& key_cache, const Tensor& value_cache,
                                    const Tensor& block_table, const Tensor& start, const Tensor& length,
                                    int64_t lag_size, int64_t keep, const MethodArguments& arguments,
                                    const std::optional<Tensor>& scores, int64_t sink_size) {
  const char* op = "compress_paged_";
  check_pair(op, kPages, key_cache, value_cache);
  check_block_table(op, block_table);
  check_capacity(op, block_table.size(1) * key_cache.size(1), "block_table.size(1) * block_size");
  check_start_and_length(op, start, length, block_table.size(0));
  check_device(op, "block_table", block_table, "key_cache", key_cache);
  check_device(op, "start", start, "key_cache", key_cache);
  check_device(op, "length", length, "key_cache", key_cache);
  // With carried scores 0 says: as many rows as before.
  const Method method = check_method(op, lag_size, keep, arguments, scores ? 0 : 1);
  check_scores(op, kPages, key_cache, scores, sink_size, method);
  check_overlap(op, {{"key_cache", &key_cache, true},
                     {"value_cache", &value_cache, true},
                     {"block_table", &block_table, false},
                     {"start", &start, true},
                     {"length", &length, true},
                     {"scores", given(scores), true}});
  return method;
}

}  // namespace lagkv
