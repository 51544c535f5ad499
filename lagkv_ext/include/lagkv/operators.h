// The operators of lagkv_ext as C++ functions over at::Tensor, for programs that link the target lagkv::lagkv
// (CMake: `find_package(lagkv_ext)` with lagkv_ext.cmake_prefix_path, or `add_subdirectory` of the sources)
// or have loaded the libraries with dlopen. Every call goes through torch's dispatcher: the same kernels,
// checks and profiler entries as torch.ops.lagkv.* in Python. What each operator computes is in README.md,
// what it refuses is a std::exception that names the argument, what it must be and what came.
//
// Gradients are registered by the Python package; a C++ program calls these under at::NoGradGuard or with
// tensors that require none.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace lagkv {

namespace detail {

/// A handle to an operator, looked up at its first call.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(op.has_value(), name,
              " is not registered: link lagkv::lagkv, or load _C.abi3.so (and _cuda.abi3.so) of lagkv_ext "
              "with dlopen");
  return op->typed<Signature>();
}

}  // namespace detail

/// Keep `keep` rows of every partition of `lag_size` but the last. `[B, H, N, D]` -> (key, value `[B, H, N',
/// D]`, index int32 `[B, H, N']`).
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> compress(const at::Tensor& key, const at::Tensor& value,
                                                               int64_t start, int64_t lag_size, int64_t keep,
                                                               double value_weight = 1.0,
                                                               std::string_view score = "std",
                                                               int64_t smooth = 1,
                                                               std::string_view budget = "partition") {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, c10::SymInt, double, std::string_view,
      int64_t, std::string_view);
  static const auto op = detail::find<Signature>("lagkv::compress");
  return op.call(key, value, start, lag_size, keep, value_weight, score, smooth, budget);
}

/// One budget for a head: the `C` rows before `start` with the scores `carried [B, H, C]` compete again. ->
/// (key, value, index, carried `[B, H, C + keep (P - 1)]`). CPU only, as are the options below.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> compress_carried(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& carried, int64_t start,
    int64_t lag_size, int64_t keep, double value_weight = 1.0, std::string_view score = "std",
    int64_t smooth = 1) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, c10::SymInt, double,
      std::string_view, int64_t);
  static const auto op = detail::find<Signature>("lagkv::compress_carried");
  return op.call(key, value, carried, start, lag_size, keep, value_weight, score, smooth);
}

/// compress in the first N' rows of `key` and `value`; returns index. With budget "head", `scores [B, H, N]`
/// may go with the rows: those of the rows sink_size .. start-1 are read, those up to the next start written.
inline at::Tensor compress_(const at::Tensor& key, const at::Tensor& value, int64_t start, int64_t lag_size,
                            int64_t keep, double value_weight = 1.0, std::string_view score = "std",
                            int64_t smooth = 1, std::string_view budget = "partition",
                            const std::optional<at::Tensor>& scores = std::nullopt, int64_t sink_size = 0) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, c10::SymInt, double,
                 std::string_view, int64_t, std::string_view, const std::optional<at::Tensor>&, c10::SymInt);
  static const auto op = detail::find<Signature>("lagkv::compress_");
  return op.call(key, value, start, lag_size, keep, value_weight, score, smooth, budget, scores, sink_size);
}

/// Least and greatest of every channel in every partition: `[B, H, N, D]` -> `[B, H, P, 2, D]`.
inline at::Tensor partition_bounds(const at::Tensor& x, int64_t start, int64_t lag_size) {
  using Signature = at::Tensor(const at::Tensor&, c10::SymInt, c10::SymInt);
  static const auto op = detail::find<Signature>("lagkv::partition_bounds");
  return op.call(x, start, lag_size);
}

/// Scores of the rows that may go: `[B, H, N, D]` -> `[B, H, P - 1, L]`.
inline at::Tensor lag_score(const at::Tensor& key, const at::Tensor& value, int64_t start, int64_t lag_size,
                            double value_weight = 1.0, std::string_view score = "std", int64_t smooth = 1) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, double,
                               std::string_view, int64_t);
  static const auto op = detail::find<Signature>("lagkv::lag_score");
  return op.call(key, value, start, lag_size, value_weight, score, smooth);
}

/// Places of the `keep` highest of the last dimension, ascending: `[..., L]` -> int32 `[..., keep]`.
inline at::Tensor topk_index(const at::Tensor& score, int64_t keep) {
  using Signature = at::Tensor(const at::Tensor&, c10::SymInt);
  static const auto op = detail::find<Signature>("lagkv::topk_index");
  return op.call(score, keep);
}

/// The rows of `x [B, H, N, D]` at `index` int32 `[B, H, K]` -> `[B, H, K, D]`.
inline at::Tensor compact(const at::Tensor& x, const at::Tensor& index) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&);
  static const auto op = detail::find<Signature>("lagkv::compact");
  return op.call(x, index);
}

/// Slots `[B, H, capacity, D]` in place, with `start` and `length` int32 `[B]`, which become the new ones.
inline at::Tensor compress_ragged_(const at::Tensor& key, const at::Tensor& value, const at::Tensor& start,
                                   const at::Tensor& length, int64_t lag_size, int64_t keep,
                                   double value_weight = 1.0, std::string_view score = "std",
                                   int64_t smooth = 1, std::string_view budget = "partition",
                                   const std::optional<at::Tensor>& scores = std::nullopt,
                                   int64_t sink_size = 0) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               c10::SymInt, c10::SymInt, double, std::string_view, int64_t, std::string_view,
                               const std::optional<at::Tensor>&, c10::SymInt);
  static const auto op = detail::find<Signature>("lagkv::compress_ragged_");
  return op.call(key, value, start, length, lag_size, keep, value_weight, score, smooth, budget, scores,
                 sink_size);
}

/// Packed rows `[T, H, D]` with `cu_seqlens` int32 `[B + 1]` and `start` int32 `[B]` -> (key, value, index
/// `[H, T]`, cu_seqlens, start) in buffers of T rows.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> compress_varlen(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens, const at::Tensor& start,
    int64_t lag_size, int64_t keep, double value_weight = 1.0, std::string_view score = "std",
    int64_t smooth = 1, std::string_view budget = "partition") {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt,
      double, std::string_view, int64_t, std::string_view);
  static const auto op = detail::find<Signature>("lagkv::compress_varlen");
  return op.call(key, value, cu_seqlens, start, lag_size, keep, value_weight, score, smooth, budget);
}

/// Pages `[blocks, block_size, H, D]` in place, with `block_table` int32 `[B, max_blocks]`, `start` and
/// `length` int32 `[B]`, which become the new ones.
inline at::Tensor compress_paged_(const at::Tensor& key_cache, const at::Tensor& value_cache,
                                  const at::Tensor& block_table, const at::Tensor& start,
                                  const at::Tensor& length, int64_t lag_size, int64_t keep,
                                  double value_weight = 1.0, std::string_view score = "std",
                                  int64_t smooth = 1, std::string_view budget = "partition",
                                  const std::optional<at::Tensor>& scores = std::nullopt,
                                  int64_t sink_size = 0) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, c10::SymInt, c10::SymInt, double, std::string_view, int64_t,
                               std::string_view, const std::optional<at::Tensor>&, c10::SymInt);
  static const auto op = detail::find<Signature>("lagkv::compress_paged_");
  return op.call(key_cache, value_cache, block_table, start, length, lag_size, keep, value_weight, score,
                 smooth, budget, scores, sink_size);
}

/// Partitions `m_before .. m_after - 1` (int32 `[B]`) of every sequence, from blocks of a pool to others of
/// it: `source_table`, `target_table` int32 `[B, blocks]`. Returns index int32 `[B, H, target rows]`.
inline at::Tensor compress_blocks(const at::Tensor& key_cache, const at::Tensor& value_cache,
                                  const at::Tensor& source_table, const at::Tensor& target_table,
                                  const at::Tensor& m_before, const at::Tensor& m_after, int64_t sink_size,
                                  int64_t lag_size, int64_t keep, double value_weight = 1.0,
                                  std::string_view score = "std", int64_t smooth = 1) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, c10::SymInt,
                               double, std::string_view, int64_t);
  static const auto op = detail::find<Signature>("lagkv::compress_blocks");
  return op.call(key_cache, value_cache, source_table, target_table, m_before, m_after, sink_size, lag_size,
                 keep, value_weight, score, smooth);
}

}  // namespace lagkv
