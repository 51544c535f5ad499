// The six operators on CUDA tensors, and their registration. Each goes the same way: checks, outputs,
// launcher (device guard, current stream), dtype, launches.
#include <tuple>

#include "launches.h"
#include "torch_launch.h"

namespace lagkv::cuda {
namespace {

template <class T>
CompressParams<T> compress_params(const Tensor& key, const Tensor& value, const Tensor* index, int64_t start,
                                  int64_t lag_size, int64_t keep, double value_weight, Score score) {
  CompressParams<T> args{};
  args.key = slot_rows<const T>(key);
  args.value = slot_rows<const T>(value);
  args.index = index == nullptr ? nullptr : static_cast<int32_t*>(index->data_ptr());
  args.batch = key.size(0);
  args.heads = key.size(1);
  args.length = key.size(2);
  args.start = start;
  args.lag_size = lag_size;
  args.keep = keep;
  args.value_weight = value_weight;
  args.score = score;
  return args;
}

std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& key, const Tensor& value, int64_t start,
                                            int64_t lag_size, int64_t keep, double value_weight,
                                            StringHandle score) {
  const Score kind =
      check_compress("compress", key, value, start, lag_size, keep, value_weight, take_text(score));
  const int64_t batch = key.size(0), heads = key.size(1),
                rows = output_length(key.size(2), start, lag_size, keep);
  const Tensor new_key = empty_on(key, {batch, heads, rows, key.size(3)}, key.scalar_type());
  const Tensor new_value = empty_on(key, {batch, heads, rows, value.size(3)}, key.scalar_type());
  const Tensor index = empty_on(key, {batch, heads, rows}, ScalarType::Int);
  if (index.numel() == 0) return {new_key, new_value, index};
  Launcher launcher(key);
  with_storage_type(key, [&](auto zero) {
    using T = decltype(zero);
    auto args = compress_params<T>(key, value, &index, start, lag_size, keep, value_weight, kind);
    args.key_out = slot_rows<T>(new_key);
    args.value_out = slot_rows<T>(new_value);
    run_compress<T, RealOf<T>>(launcher, args, nullptr);
  });
  return {new_key, new_value, index};
}

Tensor compress_(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size, int64_t keep,
                 double value_weight, StringHandle score) {
  const Score kind =
      check_compress_("compress_", key, value, start, lag_size, keep, value_weight, take_text(score));
  const int64_t batch = key.size(0), heads = key.size(1),
                rows = output_length(key.size(2), start, lag_size, keep);
  const Tensor index = empty_on(key, {batch, heads, rows}, ScalarType::Int);
  if (index.numel() == 0) return index;
  Launcher launcher(key);
  with_storage_type(key, [&](auto zero) {
    using T = decltype(zero);
    const auto args = compress_params<T>(key, value, &index, start, lag_size, keep, value_weight, kind);
    run_compress<T, RealOf<T>>(launcher, args, nullptr);
    if (rows == key.size(2)) return;  // every row stays where it is
    launch_move(slot_rows<T>(key), slot_rows<T>(value), args.index, batch, heads, start, rows,
                launcher.device(), launcher);
  });
  return index;
}

Tensor lag_score(const Tensor& key, const Tensor& value, int64_t start, int64_t lag_size, double value_weight,
                 StringHandle score) {
  const Score kind =
      check_lag_score("lag_score", key, value, start, lag_size, value_weight, take_text(score));
  const int64_t count = compressed_count(key.size(2), start, lag_size);
  const Tensor result = empty_on(key, {key.size(0), key.size(1), count, lag_size}, arithmetic_type(key));
  if (result.numel() == 0) return result;
  Launcher launcher(key);
  with_storage_type(key, [&](auto zero) {
    using T = decltype(zero);
    const auto args = compress_params<T>(key, value, nullptr, start, lag_size, lag_size, value_weight, kind);
    run_compress<T, RealOf<T>>(launcher, args, static_cast<RealOf<T>*>(result.data_ptr()));
  });
  return result;
}

Tensor partition_bounds(const Tensor& x, int64_t start, int64_t lag_size) {
  check_partition_bounds("partition_bounds", x, start, lag_size);
  const int64_t count = partition_count(x.size(2), start, lag_size);
  const Tensor bounds = empty_on(x, {x.size(0), x.size(1), count, 2, x.size(3)}, arithmetic_type(x));
  if (bounds.numel() == 0) return bounds;
  Launcher launcher(x);
  with_storage_type(x, [&](auto zero) {
    using T = decltype(zero);
    const BoundsParams<T, RealOf<T>> args{slot_rows<const T>(x),
                                          static_cast<RealOf<T>*>(bounds.data_ptr()),
                                          x.size(0),
                                          x.size(1),
                                          x.size(2),
                                          start,
                                          lag_size};
    launch_bounds<T>(args, launcher.device(), launcher);
  });
  return bounds;
}

Tensor topk_index(const Tensor& score, int64_t keep) {
  check_topk_index("topk_index", score, keep);
  std::vector<int64_t> sizes, strides;
  for (int64_t dim = 0; dim < score.dim(); ++dim) {
    sizes.push_back(score.size(dim));
    strides.push_back(score.stride(dim));
  }
  const int64_t count = sizes.back();
  sizes.back() = keep;
  const Tensor index = empty_on(score, sizes, ScalarType::Int);
  if (index.numel() == 0) return index;
  Launcher launcher(score);
  ScoreRows rows;
  Tensor merged = score;
  if (!merge_rows(sizes.data(), strides.data(), score.dim() - 1, rows)) {
    // More than kTopkDims leading dimensions that are apart in memory: a copy, once, makes them one.
    merged = torch::stable::reshape(score, {-1, count});
    rows = {{1, 1, 1, merged.size(0)}, {0, 0, 0, merged.stride(0)}};
  }
  with_storage_type(score, [&](auto zero) {
    using T = decltype(zero);
    const TopkParams<T> args{static_cast<const T*>(merged.data_ptr()),
                             0,
                             static_cast<int32_t*>(index.data_ptr()),
                             index.numel() / keep,
                             count,
                             keep};
    launch_topk<T>(args, rows, launcher.device(), launcher);
  });
  return index;
}

Tensor compact(const Tensor& x, const Tensor& index) {
  check_compact("compact", x, index);
  const Tensor out = empty_on(x, {x.size(0), x.size(1), index.size(2), x.size(3)}, x.scalar_type());
  if (out.numel() == 0) return out;
  Launcher launcher(x);
  with_storage_type(x, [&](auto zero) {
    using T = decltype(zero);
    const CompactParams<T> args{slot_rows<const T>(x),
                                slot_rows<T>(out),
                                number_rows<const int32_t>(index),
                                x.size(0),
                                x.size(1),
                                x.size(2),
                                index.size(2)};
    launch_compact(args, launcher.device(), launcher);
  });
  return out;
}

}  // namespace
}  // namespace lagkv::cuda

STABLE_TORCH_LIBRARY_IMPL(lagkv, CUDA, m) {
  m.impl("compress", TORCH_BOX(&lagkv::cuda::compress));
  m.impl("compress_", TORCH_BOX(&lagkv::cuda::compress_));
  m.impl("lag_score", TORCH_BOX(&lagkv::cuda::lag_score));
  m.impl("partition_bounds", TORCH_BOX(&lagkv::cuda::partition_bounds));
  m.impl("topk_index", TORCH_BOX(&lagkv::cuda::topk_index));
  m.impl("compact", TORCH_BOX(&lagkv::cuda::compact));
}
