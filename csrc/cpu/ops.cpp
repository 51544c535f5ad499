// The CPU implementations of torch.ops.lagkv: checks, outputs, choice of kernels by dtype and instruction
// set.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "compress.h"
#include "dispatch.h"
#include "staged.h"
#include "tensors.h"
#include "text_argument.h"

namespace lagkv::cpu {
namespace {

template <class T>
CompressParams<T> compress_params(const Tensor& key, const Tensor& value, const Tensor& key_out,
                                  const Tensor& value_out, const Tensor& index, int64_t start,
                                  int64_t lag_size, int64_t keep, double value_weight, Score score) {
  return {slot_rows<const T>(key),
          slot_rows<const T>(value),
          slot_rows<T>(key_out),
          slot_rows<T>(value_out),
          static_cast<int32_t*>(index.data_ptr()),
          key.size(0),
          key.size(1),
          key.size(2),
          start,
          lag_size,
          keep,
          value_weight,
          score};
}

std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& key, const Tensor& value, int64_t start,
                                            int64_t lag_size, int64_t keep, double value_weight,
                                            StringHandle score) {
  const Score kind =
      check_compress("compress", key, value, start, lag_size, keep, value_weight, take_text(score));
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t batch = key.size(0), heads = key.size(1),
                length = output_length(key.size(2), start, lag_size, keep);
  const Tensor key_out = new_tensor({batch, heads, length, key.size(3)}, key.scalar_type());
  const Tensor value_out = new_tensor({batch, heads, length, value.size(3)}, value.scalar_type());
  const Tensor index = new_tensor({batch, heads, length}, ScalarType::Int);
  by_dtype(key, [&](auto type) {
    using T = decltype(type);
    const auto params =
        compress_params<T>(key, value, key_out, value_out, index, start, lag_size, keep, value_weight, kind);
    Compressor<T>(dense_batch(params), kernels.of<T>()).copy();
  });
  return {key_out, value_out, index};
}

Tensor compress_(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size, int64_t keep,
                 double value_weight, StringHandle score) {
  const Score kind =
      check_compress_("compress_", key, value, start, lag_size, keep, value_weight, take_text(score));
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t length = output_length(key.size(2), start, lag_size, keep);
  const Tensor index = new_tensor({key.size(0), key.size(1), length}, ScalarType::Int);
  by_dtype(key, [&](auto type) {
    using T = decltype(type);
    const auto params =
        compress_params<T>(key, value, key, value, index, start, lag_size, keep, value_weight, kind);
    Compressor<T>(dense_batch(params), kernels.of<T>()).in_place();
  });
  return index;
}

Tensor partition_bounds(const Tensor& x, int64_t start, int64_t lag_size) {
  check_partition_bounds("partition_bounds", x, start, lag_size);
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2);
  const Tensor out =
      new_tensor({batch, heads, partition_count(length, start, lag_size), 2, x.size(3)}, arithmetic_type(x));
  by_dtype(x, [&](auto type) {
    using T = decltype(type);
    const BoundsParams<T, RealOf<T>> params{slot_rows<const T>(x),
                                            static_cast<RealOf<T>*>(out.data_ptr()),
                                            batch,
                                            heads,
                                            length,
                                            start,
                                            lag_size};
    run_partition_bounds(params, kernels.of<T>());
  });
  return out;
}

Tensor lag_score(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size, double value_weight,
                 StringHandle score) {
  const Score kind =
      check_lag_score("lag_score", key, value, start, lag_size, value_weight, take_text(score));
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t batch = key.size(0), heads = key.size(1), length = key.size(2);
  const Tensor out =
      new_tensor({batch, heads, compressed_count(length, start, lag_size), lag_size}, arithmetic_type(key));
  by_dtype(key, [&](auto type) {
    using T = decltype(type);
    const ScoreParams<T, RealOf<T>> params{slot_rows<const T>(key),
                                           slot_rows<const T>(value),
                                           static_cast<RealOf<T>*>(out.data_ptr()),
                                           batch,
                                           heads,
                                           length,
                                           start,
                                           lag_size,
                                           value_weight,
                                           kind};
    run_lag_score(params, kernels.of<T>());
  });
  return out;
}

Tensor topk_index(const Tensor& score, int64_t keep) {
  check_topk_index("topk_index", score, keep);
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t leading = score.dim() - 1, lag_size = score.size(leading);
  const auto sizes = score.sizes(), strides = score.strides();
  std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
  out_sizes.back() = keep;
  const Tensor index = new_tensor(out_sizes.data(), static_cast<int64_t>(out_sizes.size()), ScalarType::Int);
  int64_t rows = 1;
  for (int64_t dim = 0; dim < leading; ++dim) rows *= sizes[dim];
  by_dtype(score, [&](auto type) {
    using T = decltype(type);
    const T* data = static_cast<const T*>(score.data_ptr());
    // Leading dimensions may have any strides.
    const auto row = [&](int64_t i) {
      int64_t offset = 0;
      for (int64_t dim = leading - 1; dim >= 0; i /= sizes[dim], --dim)
        offset += i % sizes[dim] * strides[dim];
      return data + offset;
    };
    run_topk_index<T>(row, rows, lag_size, keep, static_cast<int32_t*>(index.data_ptr()), kernels.of<T>());
  });
  return index;
}

Tensor compact(const Tensor& x, const Tensor& index) {
  check_compact("compact", x, index);
  const KernelSet& kernels = *instruction_set().kernels;
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2), count = index.size(2);
  Tensor out;
  by_dtype(x, [&](auto type) {
    using T = decltype(type);
    CompactParams<T> params{
        slot_rows<const T>(x), {}, number_rows<const int32_t>(index), batch, heads, length, count};
    const int32_t* bad = index_out_of_range(params);
    check(bad == nullptr, "compact", "index must hold positions between 0 and ", length - 1, ", got ",
          bad ? *bad : 0);
    out = new_tensor({batch, heads, count, x.size(3)}, x.scalar_type());
    params.out = slot_rows<T>(out);
    run_compact(params, kernels.of<T>());
  });
  return out;
}

std::string cpu_isa() { return instruction_set().name; }

}  // namespace
}  // namespace lagkv::cpu

STABLE_TORCH_LIBRARY_IMPL(lagkv, CPU, m) {
  m.impl("compress", TORCH_BOX(&lagkv::cpu::compress));
  m.impl("compress_", TORCH_BOX(&lagkv::cpu::compress_));
  m.impl("partition_bounds", TORCH_BOX(&lagkv::cpu::partition_bounds));
  m.impl("lag_score", TORCH_BOX(&lagkv::cpu::lag_score));
  m.impl("topk_index", TORCH_BOX(&lagkv::cpu::topk_index));
  m.impl("compact", TORCH_BOX(&lagkv::cpu::compact));
}

// No tensor tells the dispatcher where to go.
STABLE_TORCH_LIBRARY_IMPL(lagkv, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&lagkv::cpu::cpu_isa));
}
