// The CPU implementations of the ragged operators: checks of arguments and values, then one driver.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "compress.h"
#include "dispatch.h"
#include "ragged_tensors.h"
#include "ragged_values.h"
#include "tensors.h"
#include "text_argument.h"

namespace lagkv::cpu {
namespace {

/// Rows in place, then the numbers: the driver reads the old ones.
template <class T>
void compress_in_place(const RaggedParams<T>& params, const KernelSet& kernels) {
  const Batch<T> batch = ragged_batch(params);
  Compressor<T>(batch, kernels.of<T>()).in_place();
  for (int64_t b = 0; b < params.batch; ++b) {
    const RaggedSequence sequence = params.sequence(b);
    params.new_start[b] = static_cast<int32_t>(sequence.new_start);
    params.new_length[b] = static_cast<int32_t>(sequence.new_length);
  }
}

Tensor compress_ragged_(const Tensor& key, const Tensor& value, const Tensor& start, const Tensor& length,
                        int64_t lag_size, int64_t keep, double value_weight, StringHandle score) {
  const Score kind =
      check_compress_ragged_(key, value, start, length, lag_size, keep, value_weight, take_text(score));
  const KernelSet& kernels = *instruction_set().kernels;
  const Tensor index = new_tensor({key.size(0), key.size(1), key.size(2)}, ScalarType::Int);
  by_dtype(key, [&](auto type) {
    using T = decltype(type);
    const auto params = slot_params<T>(key, value, start, length, index, lag_size, keep, value_weight, kind);
    check_slot_values(params);
    compress_in_place(params, kernels);
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
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t rows = key.size(0), heads = key.size(1), batch = start.size(0);
  const Tensor new_key = new_tensor({rows, heads, key.size(2)}, key.scalar_type());
  const Tensor new_value = new_tensor({rows, heads, value.size(2)}, value.scalar_type());
  const Tensor index = new_tensor({heads, rows}, ScalarType::Int);
  const Tensor new_cu_seqlens = new_tensor({batch + 1}, ScalarType::Int);
  const Tensor new_start = new_tensor({batch}, ScalarType::Int);
  by_dtype(key, [&](auto type) {
    using T = decltype(type);
    const auto params = packed_params<T>(key, value, cu_seqlens, start, new_key, new_value, index,
                                         new_cu_seqlens, new_start, lag_size, keep, value_weight, kind);
    check_packed_values(params);
    params.new_offsets[0] = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const RaggedSequence sequence = params.sequence(b);
      params.new_start[b] = static_cast<int32_t>(sequence.new_start);
      params.new_offsets[b + 1] = params.new_offsets[b] + static_cast<int32_t>(sequence.new_length);
    }
    if (batch == 0) std::fill_n(params.index, heads * rows, -1);  // rows that are no sequence's
    Compressor<T>(ragged_batch(params), kernels.of<T>()).copy();
  });
  return {new_key, new_value, index, new_cu_seqlens, new_start};
}

Tensor compress_paged_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                       const Tensor& start, const Tensor& length, int64_t lag_size, int64_t keep,
                       double value_weight, StringHandle score) {
  const Score kind = check_compress_paged_(key_cache, value_cache, block_table, start, length, lag_size, keep,
                                           value_weight, take_text(score));
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t capacity = block_table.size(1) * key_cache.size(1);
  const Tensor index = new_tensor({block_table.size(0), key_cache.size(2), capacity}, ScalarType::Int);
  by_dtype(key_cache, [&](auto type) {
    using T = decltype(type);
    const auto params = page_params<T>(key_cache, value_cache, block_table, start, length, index, lag_size,
                                       keep, value_weight, kind);
    check_page_values(params);
    compress_in_place(params, kernels);
  });
  return index;
}

}  // namespace
}  // namespace lagkv::cpu

STABLE_TORCH_LIBRARY_IMPL(lagkv, CPU, m) {
  m.impl("compress_ragged_", TORCH_BOX(&lagkv::cpu::compress_ragged_));
  m.impl("compress_varlen", TORCH_BOX(&lagkv::cpu::compress_varlen));
  m.impl("compress_paged_", TORCH_BOX(&lagkv::cpu::compress_paged_));
}
