// The three ragged operators on CUDA tensors, and their registration. Each goes the same way: checks of all
// that the host can see, outputs, launcher (device guard, current stream), dtype, launches. Starts, lengths
// and block tables are read on the device alone (ragged_schedule.cuh says what becomes of bad ones), so
// nothing waits for it and a captured graph follows them.
#include <tuple>

#include "../checks_ragged.h"
#include "../ragged_tensors.h"
#include "ragged_launches.h"
#include "torch_launch.h"

namespace lagkv::cuda {

// In ragged_<type>.cu: the kernels are what takes long to compile.
template <class T>
void run_ragged(Launcher& launcher, const RaggedParams<T>& args, const SequenceTable& table);

namespace {

/// Everything of one call; `params(zero)` makes the arguments for the storage type of `zero`.
template <class Params>
void run(const Tensor& key, int64_t batch, bool in_place, const Params& params) {
  Launcher launcher(key);
  const SequenceTable table = make_table(batch, [&](int64_t bytes) { return launcher.scratch(bytes); });
  with_storage_type(key, [&](auto zero) {
    const auto args = params(zero);
    run_ragged<decltype(zero)>(launcher, args, table);
    if (in_place) launch_ragged_move(args, table, launcher.device(), launcher);
  });
}

Tensor compress_ragged_(const Tensor& key, const Tensor& value, const Tensor& start, const Tensor& length,
                        int64_t lag_size, int64_t keep, double value_weight, StringHandle score) {
  const Score kind =
      check_compress_ragged_(key, value, start, length, lag_size, keep, value_weight, take_text(score));
  const Tensor index = empty_on(key, {key.size(0), key.size(1), key.size(2)}, ScalarType::Int);
  run(key, key.size(0), true, [&](auto zero) {
    return slot_params<decltype(zero)>(key, value, start, length, index, lag_size, keep, value_weight, kind);
  });
  return index;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_varlen(const Tensor& key, const Tensor& value,
                                                                   const Tensor& cu_seqlens,
                                                                   const Tensor& start, int64_t lag_size,
                                                                   int64_t keep, double value_weight,
                                                                   StringHandle score) {
  const Score kind =
      check_compress_varlen(key, value, cu_seqlens, start, lag_size, keep, value_weight, take_text(score));
  const int64_t rows = key.size(0), heads = key.size(1), batch = start.size(0);
  const Tensor new_key = empty_on(key, {rows, heads, key.size(2)}, key.scalar_type());
  const Tensor new_value = empty_on(key, {rows, heads, value.size(2)}, key.scalar_type());
  const Tensor index = empty_on(key, {heads, rows}, ScalarType::Int);
  const Tensor new_cu_seqlens = empty_on(key, {batch + 1}, ScalarType::Int);
  const Tensor new_start = empty_on(key, {batch}, ScalarType::Int);
  run(key, batch, false, [&](auto zero) {
    return packed_params<decltype(zero)>(key, value, cu_seqlens, start, new_key, new_value, index,
                                         new_cu_seqlens, new_start, lag_size, keep, value_weight, kind);
  });
  return {new_key, new_value, index, new_cu_seqlens, new_start};
}

Tensor compress_paged_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                       const Tensor& start, const Tensor& length, int64_t lag_size, int64_t keep,
                       double value_weight, StringHandle score) {
  const Score kind = check_compress_paged_(key_cache, value_cache, block_table, start, length, lag_size, keep,
                                           value_weight, take_text(score));
  const int64_t batch = block_table.size(0), capacity = block_table.size(1) * key_cache.size(1);
  const Tensor index = empty_on(key_cache, {batch, key_cache.size(2), capacity}, ScalarType::Int);
  run(key_cache, batch, true, [&](auto zero) {
    return page_params<decltype(zero)>(key_cache, value_cache, block_table, start, length, index, lag_size,
                                       keep, value_weight, kind);
  });
  return index;
}

}  // namespace
}  // namespace lagkv::cuda

STABLE_TORCH_LIBRARY_IMPL(lagkv, CUDA, m) {
  m.impl("compress_ragged_", TORCH_BOX(&lagkv::cuda::compress_ragged_));
  m.impl("compress_varlen", TORCH_BOX(&lagkv::cuda::compress_varlen));
  m.impl("compress_paged_", TORCH_BOX(&lagkv::cuda::compress_paged_));
}
