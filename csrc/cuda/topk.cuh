// topk_index: per row the positions of the `keep` highest scores, ascending (select.cuh). Traffic: every
// score once (where a row does not fit in shared memory: once per 8 bits of the arithmetic's type and twice
// more); writes the index.
#pragma once

#include "../params.h"
#include "select.cuh"

namespace lagkv::cuda {

template <class T>
struct TopkLaunch {
  TopkParams<T> args;
  TopkPlan plan;
};

/// Ordered scores computed from the scores themselves at every read; zeros behind the last one.
template <class T>
struct ScoreKeys {
  const T* score;
  int count;

  __device__ __forceinline__ BitsOf<T> get(int i) const {
    return i < count ? ordered(to_real(ld_global_nc(score + i))) : BitsOf<T>(0);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) topk_kernel(const TopkLaunch<T> launch) {
  using Bits = BitsOf<T>;
  LAGKV_SHARED(int, counts, 4 * kWarps);
  LAGKV_SHARED(unsigned, histogram, kBins + 2);
  const int count = static_cast<int>(launch.args.lag_size), keep = static_cast<int>(launch.args.keep);
  const int64_t row = blockIdx.x;
  const ScoreKeys<T> scores{launch.args.score + launch.args.places.offset(row), count};
  const KeptIndex kept{launch.args.index + row * launch.args.keep, 0};
  if (launch.plan.shared_bytes > 0) {
    LAGKV_DYNAMIC_SHARED(shared);
    const Store<Bits> keys{reinterpret_cast<Bits*>(shared), false};
    for (int i = thread_of_block(); i < padded_lag(count); i += kThreads) keys.set(i, scores.get(i));
    __syncthreads();
    select<Bits>(keys, count, keep, {counts, histogram}, kept);
  } else {
    select_by_radix<Bits>(scores, count, keep, {counts, histogram}, kept);
  }
}

}  // namespace lagkv::cuda
