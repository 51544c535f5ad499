// From the statistics of a partition's tokens to their scores (docs/method.md 1, step 5, and 2):
//
//   std:     score = softmax_t(s_K) + w softmax_t(s_V)
//   cosine:  score = z(s_K) + w z(s_V),  z = (s - mean) / std over the partition, unbiased, 0 where std = 0
//   or L = 1
//
// Two reductions over the block, for key and value at once; nothing leaves the block.
#pragma once

#include "std_score.cuh"

namespace lagkv::cuda {

/// Statistics [L] of key and value on entry. Calls result(t, score) with every token's score, from the
/// thread that owns t. `slots` [2, 2 * kWarps] shared. All threads have passed a barrier after the last read
/// of another thread's statistic.
template <Score kScore, class Real, class Result>
__device__ __forceinline__ void combine_scores(const Store<Real>& key, const Store<Real>& value, int count,
                                               int64_t key_dim, int64_t value_dim, Real weight, Real* slots,
                                               const Result& result) {
  const auto for_tokens = [&](const auto& visit) {
#pragma unroll 1  // few tokens per thread: registers matter more
    for (unsigned t = thread_of_block(); t < static_cast<unsigned>(count); t += kThreads)
      visit(static_cast<int>(t));
  };
  if constexpr (kScore == Score::kStd) {
    Two<Real> most{infinity<Real>(1), infinity<Real>(1)};
    for_tokens([&](int t) {
      const Two<Real> s{deviation(key.get(t), key_dim), deviation(value.get(t), value_dim)};
      key.set(t, s.key);
      value.set(t, s.value);
      most = {larger(most.key, s.key), larger(most.value, s.value)};
    });
    most = block_two<true>(most, slots);
    // A NaN or an infinity makes the sum NaN, and with it every score of the partition, as torch.softmax
    // does.
    Two<Real> sum{0, 0};
    for_tokens([&](int t) {
      const Two<Real> e{exponential(key.get(t) - most.key), exponential(value.get(t) - most.value)};
      key.set(t, e.key);
      value.set(t, e.value);
      sum = {sum.key + e.key, sum.value + e.value};
    });
    sum = block_two<false>(sum, slots + 2 * kWarps);
    for_tokens([&](int t) { result(t, key.get(t) / sum.key + weight * (value.get(t) / sum.value)); });
  } else {
    // Relative to the first token's, so that equal statistics have a deviation of exactly 0.
    const Two<Real> origin{key.get(0), value.get(0)};
    Two<Real> mean{0, 0};
    for_tokens([&](int t) {
      mean = {mean.key + (key.get(t) - origin.key), mean.value + (value.get(t) - origin.value)};
    });
    mean = block_two<false>(mean, slots);
    mean = {mean.key / static_cast<Real>(count), mean.value / static_cast<Real>(count)};
    const auto off = [&](int t) {
      return Two<Real>{(key.get(t) - origin.key) - mean.key, (value.get(t) - origin.value) - mean.value};
    };
    Two<Real> squares{0, 0};
    for_tokens([&](int t) {
      const Two<Real> x = off(t);
      squares = {squares.key + x.key * x.key, squares.value + x.value * x.value};
    });
    squares = block_two<false>(squares, slots + 2 * kWarps);
    const auto deviation_of = [&](Real sum) { return square_root(sum / static_cast<Real>(count - 1)); };
    const Two<Real> std{deviation_of(squares.key), deviation_of(squares.value)};
    const auto z = [&](Real x, Real spread) {
      return count == 1 || spread == Real(0) ? Real(0) : x / spread;
    };
    for_tokens([&](int t) {
      const Two<Real> x = off(t);
      result(t, z(x.key, std.key) + weight * z(x.value, std.value));
    });
  }
}

}  // namespace lagkv::cuda
