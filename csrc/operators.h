// torch.ops.lagkv, written once for every backend: checks, outputs, storage type, and one call of a launcher.
// Each backend's own source (cpu/ops.cpp, cuda/ops.cu) has the launchers, and registers the operators.
//
// A backend is a class, made once a call before any output exists:
//
//   explicit Backend(const Tensor& like)     finds the instruction set, or the device and its stream
//   Half, BFloat16                           storage types beside float and double
//   RealOf<T>                                the type that arithmetic on T runs in
//   compress(CompressParams<T>)              into outputs that are not the inputs
//   compress_(CompressParams<T>)             in place: key_out = key, value_out = value
//   partition_bounds(BoundsParams<T, RealOf<T>>)
//   lag_score(ScoreParams<T, RealOf<T>>)
//   topk_index(TopkParams<T>)
//   compact(CompactParams<T>)
//   compress_ragged_(RaggedParams<T>), compress_varlen(RaggedParams<T>), compress_paged_(RaggedParams<T>)
//   compress_blocks(BlocksParams<T>)
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "block_checks.h"
#include "checks.h"
#include "ragged_tensors.h"
#include "tensors.h"
#include "text_argument.h"

namespace lagkv {

template <class Backend>
struct Operators {
  template <class T>
  using RealOf = typename Backend::template RealOf<T>;

  /// Calls body(T()) with the storage type of x, which the checks have found to be one of these.
  template <class Body>
  static void with_storage_type(const Tensor& x, const Body& body) {
    switch (x.scalar_type()) {
      case ScalarType::Half: return body(typename Backend::Half());
      case ScalarType::BFloat16: return body(typename Backend::BFloat16());
      case ScalarType::Float: return body(float());
      default: return body(double());
    }
  }

  /// A handle crosses the ABI once, so both texts are taken before anything throws.
  static MethodArguments taken(double value_weight, StringHandle score, int64_t smooth) {
    return {value_weight, take_text(score), smooth};
  }
  static MethodArguments taken(double value_weight, StringHandle score, int64_t smooth, StringHandle budget) {
    MethodArguments arguments = taken(value_weight, score, smooth);
    arguments.budget = take_text(budget);
    return arguments;
  }

  template <class T>
  static CompressParams<T> compress_params(const Tensor& key, const Tensor& value, const Tensor& key_out,
                                           const Tensor& value_out, const Tensor& index, int64_t start,
                                           int64_t lag_size, int64_t keep, const Method& method) {
    return {slot_rows<const T>(key),
            slot_rows<const T>(value),
            slot_rows<T>(key_out),
            slot_rows<T>(value_out),
            written_numbers(index),
            key.size(0),
            key.size(1),
            key.size(2),
            start,
            lag_size,
            keep,
            method,
            {}};
  }

  /// The outputs key, value and index of a compression of dense rows.
  static std::tuple<Tensor, Tensor, Tensor> new_rows(const Tensor& key, const Tensor& value, int64_t start,
                                                     int64_t lag_size, int64_t keep) {
    const int64_t batch = key.size(0), heads = key.size(1),
                  rows = output_length(key.size(2), start, lag_size, keep);
    return {new_tensor(key, {batch, heads, rows, key.size(3)}, key.scalar_type()),
            new_tensor(key, {batch, heads, rows, value.size(3)}, key.scalar_type()),
            new_tensor(key, {batch, heads, rows}, ScalarType::Int)};
  }

  static std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& key, const Tensor& value, int64_t start,
                                                     int64_t lag_size, int64_t keep, double value_weight,
                                                     StringHandle score, int64_t smooth,
                                                     StringHandle budget) {
    const Method method = check_compress("compress", key, value, start, lag_size, keep,
                                         taken(value_weight, score, smooth, budget));
    Backend backend(key);
    const auto rows = new_rows(key, value, start, lag_size, keep);
    with_storage_type(key, [&](auto type) {
      const auto& [new_key, new_value, index] = rows;
      backend.compress(compress_params<decltype(type)>(key, value, new_key, new_value, index, start, lag_size,
                                                       keep, method));
    });
    return rows;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> compress_carried(const Tensor& key, const Tensor& value,
                                                                     const Tensor& carried, int64_t start,
                                                                     int64_t lag_size, int64_t keep,
                                                                     double value_weight, StringHandle score,
                                                                     int64_t smooth) {
    MethodArguments arguments = taken(value_weight, score, smooth);
    arguments.budget = "head";
    const Method method = check_compress_carried(key, value, carried, start, lag_size, keep, arguments);
    Backend backend(key);
    const auto [new_key, new_value, index] = new_rows(key, value, start, lag_size, keep);
    const int64_t rows = carried.size(2) + keep * compressed_count(key.size(2), start, lag_size);
    const Tensor new_carried = new_tensor(key, {key.size(0), key.size(1), rows}, carried.scalar_type());
    with_storage_type(key, [&, &new_key = new_key, &new_value = new_value, &index = index](auto type) {
      using T = decltype(type);
      using Real = ScoreOf<T>;
      auto params = compress_params<T>(key, value, new_key, new_value, index, start, lag_size, keep, method);
      const int64_t sink = start - carried.size(2);
      params.carried = {true, sink, sink, number_rows<const Real>(carried), number_rows<Real>(new_carried)};
      backend.compress(params);
    });
    return {new_key, new_value, index, new_carried};
  }

  static Tensor compress_(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size,
                          int64_t keep, double value_weight, StringHandle score, int64_t smooth,
                          StringHandle budget, std::optional<Tensor> scores, int64_t sink_size) {
    const Method method = check_compress_(key, value, start, lag_size, keep,
                                          taken(value_weight, score, smooth, budget), scores, sink_size);
    Backend backend(key);
    const int64_t rows = output_length(key.size(2), start, lag_size, keep);
    const Tensor index = new_tensor(key, {key.size(0), key.size(1), rows}, ScalarType::Int);
    with_storage_type(key, [&](auto type) {
      using T = decltype(type);
      auto params = compress_params<T>(key, value, key, value, index, start, lag_size, keep, method);
      if (scores) params.carried = slot_scores<T>(*scores, sink_size);
      backend.compress_(params);
    });
    return index;
  }

  static Tensor partition_bounds(const Tensor& x, int64_t start, int64_t lag_size) {
    check_partition_bounds(x, start, lag_size);
    Backend backend(x);
    const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2),
                  count = partition_count(length, start, lag_size);
    const Tensor bounds = new_tensor(x, {batch, heads, count, 2, x.size(3)}, arithmetic_type(x));
    with_storage_type(x, [&](auto type) {
      using T = decltype(type);
      using Real = RealOf<T>;
      backend.partition_bounds(BoundsParams<T, Real>{slot_rows<const T>(x),
                                                     static_cast<Real*>(bounds.data_ptr()), batch, heads,
                                                     length, start, lag_size});
    });
    return bounds;
  }

  static Tensor lag_score(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size,
                          double value_weight, StringHandle score, int64_t smooth) {
    const Method method = check_lag_score(key, value, start, lag_size, taken(value_weight, score, smooth));
    Backend backend(key);
    const int64_t batch = key.size(0), heads = key.size(1), length = key.size(2),
                  count = compressed_count(length, start, lag_size);
    const Tensor scores = new_tensor(key, {batch, heads, count, lag_size}, arithmetic_type(key));
    with_storage_type(key, [&](auto type) {
      using T = decltype(type);
      using Real = RealOf<T>;
      backend.lag_score(ScoreParams<T, Real>{slot_rows<const T>(key), slot_rows<const T>(value),
                                             static_cast<Real*>(scores.data_ptr()), batch, heads, length,
                                             start, lag_size, method});
    });
    return scores;
  }

  static Tensor topk_index(const Tensor& score, int64_t keep) {
    check_topk_index(score, keep);
    Backend backend(score);
    const auto sizes = score.sizes();
    const int64_t leading = score.dim() - 1, count = sizes[static_cast<size_t>(leading)];
    std::vector<int64_t> index_sizes(sizes.begin(), sizes.end());
    index_sizes.back() = keep;
    const Tensor index = new_tensor(score, index_sizes.data(), leading + 1, ScalarType::Int);
    Tensor merged = score;
    ScoreRows rows;
    if (!merge_rows(sizes.data(), score.strides().data(), leading, rows)) {
      merged = torch::stable::reshape(score, {-1, count});  // a copy, once
      rows = {{1, 1, 1, merged.size(0)}, {0, 0, 0, merged.stride(0)}};
    }
    with_storage_type(score, [&](auto type) {
      using T = decltype(type);
      backend.topk_index(TopkParams<T>{static_cast<const T*>(merged.data_ptr()), rows, written_numbers(index),
                                       index.numel() / keep, count, keep});
    });
    return index;
  }

  static Tensor compact(const Tensor& x, const Tensor& index) {
    check_compact(x, index);
    Backend backend(x);
    const int64_t batch = x.size(0), heads = x.size(1), count = index.size(2);
    const Tensor out = new_tensor(x, {batch, heads, count, x.size(3)}, x.scalar_type());
    with_storage_type(x, [&](auto type) {
      using T = decltype(type);
      backend.compact(CompactParams<T>{slot_rows<const T>(x), slot_rows<T>(out),
                                       number_rows<const int32_t>(index), batch, heads, x.size(2), count});
    });
    return out;
  }

  static Tensor compress_ragged_(const Tensor& key, const Tensor& value, const Tensor& start,
                                 const Tensor& length, int64_t lag_size, int64_t keep, double value_weight,
                                 StringHandle score, int64_t smooth, StringHandle budget,
                                 std::optional<Tensor> scores, int64_t sink_size) {
    const Method method =
        check_compress_ragged_(key, value, start, length, lag_size, keep,
                               taken(value_weight, score, smooth, budget), scores, sink_size);
    Backend backend(key);
    const Tensor index = new_tensor(key, {key.size(0), key.size(1), key.size(2)}, ScalarType::Int);
    with_storage_type(key, [&](auto type) {
      using T = decltype(type);
      auto params = slot_params<T>(key, value, start, length, index, lag_size, keep, method);
      if (scores) params.carried = slot_scores<T>(*scores, sink_size);
      backend.compress_ragged_(params);
    });
    return index;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_varlen(
      const Tensor& key, const Tensor& value, const Tensor& cu_seqlens, const Tensor& start, int64_t lag_size,
      int64_t keep, double value_weight, StringHandle score, int64_t smooth, StringHandle budget) {
    const Method method = check_compress_varlen(key, value, cu_seqlens, start, lag_size, keep,
                                                taken(value_weight, score, smooth, budget));
    Backend backend(key);
    const int64_t rows = key.size(0), heads = key.size(1), batch = start.size(0);
    const Tensor new_key = new_tensor(key, {rows, heads, key.size(2)}, key.scalar_type());
    const Tensor new_value = new_tensor(key, {rows, heads, value.size(2)}, key.scalar_type());
    const Tensor index = new_tensor(key, {heads, rows}, ScalarType::Int);
    const Tensor new_cu_seqlens = new_tensor(key, {batch + 1}, ScalarType::Int);
    const Tensor new_start = new_tensor(key, {batch}, ScalarType::Int);
    with_storage_type(key, [&](auto type) {
      backend.compress_varlen(packed_params<decltype(type)>(key, value, cu_seqlens, start, new_key, new_value,
                                                            index, new_cu_seqlens, new_start, lag_size, keep,
                                                            method));
    });
    return {new_key, new_value, index, new_cu_seqlens, new_start};
  }

  static Tensor compress_paged_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                                const Tensor& start, const Tensor& length, int64_t lag_size, int64_t keep,
                                double value_weight, StringHandle score, int64_t smooth, StringHandle budget,
                                std::optional<Tensor> scores, int64_t sink_size) {
    const Method method =
        check_compress_paged_(key_cache, value_cache, block_table, start, length, lag_size, keep,
                              taken(value_weight, score, smooth, budget), scores, sink_size);
    Backend backend(key_cache);
    const int64_t capacity = block_table.size(1) * key_cache.size(1);
    const Tensor index =
        new_tensor(key_cache, {block_table.size(0), key_cache.size(2), capacity}, ScalarType::Int);
    with_storage_type(key_cache, [&](auto type) {
      using T = decltype(type);
      auto params =
          page_params<T>(key_cache, value_cache, block_table, start, length, index, lag_size, keep, method);
      if (scores) params.carried = page_scores<T>(*scores, block_table, sink_size);
      backend.compress_paged_(params);
    });
    return index;
  }

  static Tensor compress_blocks(const Tensor& key_cache, const Tensor& value_cache,
                                const Tensor& source_table, const Tensor& target_table,
                                const Tensor& m_before, const Tensor& m_after, int64_t sink_size,
                                int64_t lag_size, int64_t keep, double value_weight, StringHandle score,
                                int64_t smooth) {
    const Method method =
        check_compress_blocks(key_cache, value_cache, source_table, target_table, m_before, m_after,
                              sink_size, lag_size, keep, taken(value_weight, score, smooth));
    Backend backend(key_cache);
    const PoolSizes pool = pool_sizes(key_cache);
    const Tensor index =
        new_tensor(key_cache, {source_table.size(0), pool.heads, target_table.size(1) * pool.block_size},
                   ScalarType::Int);
    with_storage_type(key_cache, [&](auto type) {
      backend.compress_blocks(block_params<decltype(type)>(key_cache, value_cache, source_table, target_table,
                                                           m_before, m_after, index, sink_size, lag_size,
                                                           keep, method));
    });
    return index;
  }

  static void register_with(torch::stable::detail::StableLibrary& library) {
    library.impl("compress", TORCH_BOX(&Operators::compress));
    library.impl("compress_carried", TORCH_BOX(&Operators::compress_carried));
    library.impl("compress_", TORCH_BOX(&Operators::compress_));
    library.impl("partition_bounds", TORCH_BOX(&Operators::partition_bounds));
    library.impl("lag_score", TORCH_BOX(&Operators::lag_score));
    library.impl("topk_index", TORCH_BOX(&Operators::topk_index));
    library.impl("compact", TORCH_BOX(&Operators::compact));
    library.impl("compress_ragged_", TORCH_BOX(&Operators::compress_ragged_));
    library.impl("compress_varlen", TORCH_BOX(&Operators::compress_varlen));
    library.impl("compress_paged_", TORCH_BOX(&Operators::compress_paged_));
    library.impl("compress_blocks", TORCH_BOX(&Operators::compress_blocks));
  }
};

}  // namespace lagkv
