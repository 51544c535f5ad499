// Smoothing of the scores of one partition, by the block that has scored it.
#pragma once

#include "block.cuh"

namespace lagkv::cuda {

/// to_t = mean of from_u over |u - t| <= smooth / 2 in the partition, terms added in ascending order. Every
/// thread its own tokens; all of `from` was written before a barrier.
template <class Real>
__device__ __forceinline__ void smooth_scores(const Store<Real>& from, const Store<Real>& to, int count,
                                              int64_t smooth) {
  const int reach = static_cast<int>(smooth / 2 < count ? smooth / 2 : count - 1);
#pragma unroll 1
  for (int t = thread_of_block(); t < count; t += kThreads) {
    const int first = t < reach ? 0 : t - reach, last = t < count - reach ? t + reach : count - 1;
    Real sum = 0;
#pragma unroll 1
    for (int u = first; u <= last; ++u) sum += from.get(u);
    to.set(t, sum / static_cast<Real>(last - first + 1));
  }
}

}  // namespace lagkv::cuda
