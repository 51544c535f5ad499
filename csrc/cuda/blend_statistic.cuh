// The statistics of a blend (docs/method.md 2): of each token the std statistic against the next partition's
// bounds, and minus the cosine to its mean direction. Two passes over a partition of one tensor: registers
// for both states at once would cost blocks per multiprocessor. The second pass comes right after the first,
// whose rows (L D elements a block) it finds in L2: DRAM is read once as long as the tiles of all
// blocks at a time fit there.
//
//   score = -cos_K + L softmax_t(s_K) + w (-cos_V + L softmax_t(s_V))
#pragma once

#include "score.cuh"

namespace lagkv::cuda {

/// The same run with the memory of the cosine's pass: anchors behind the bounds, statistics of their own.
template <class Run>
struct CosinePass {
  using Tile = typename Run::Tile;
  using Real = typename Run::Real;
  const Run& run;

  __device__ __forceinline__ PassStores<Real> stores(int side) const {
    PassStores<Real> own = run.stores(side);
    own.reference = own.reference + 3 * run.dim(side);
    own.statistics = run.statistics(3 + side);
    return own;
  }
  __device__ __forceinline__ Tile tile(int side, int partition) const { return run.tile(side, partition); }
  __device__ __forceinline__ bool scores(int partition) const { return run.scores(partition); }
  __device__ __forceinline__ bool makes_reference(int partition) const {
    return run.makes_reference(partition);
  }
  __device__ __forceinline__ int count() const { return run.count(); }
  __device__ __forceinline__ int64_t dim(int side) const { return run.dim(side); }
};

/// Both passes. Each ends with a barrier after its last use of `partial` and the statistics.
template <class Layout, class Run>
__device__ __forceinline__ void visit_for_blend(const Run& run, int side, int partition) {
  visit_partition<Layout, Score::kStd>(run, side, partition);
  visit_partition<Layout, Score::kCosine>(CosinePass<Run>{run}, side, partition);
}

/// Adds the cosines to statistics(0), which holds the scores of the std statistics: L times those, plus
/// these. Every thread its own tokens.
template <class Run, class Real>
__device__ __forceinline__ void add_cosines(const Run& run, Real weight) {
  const unsigned count = run.count();
  const Store<Real> scores = run.statistics(0), key = run.statistics(3), value = run.statistics(4);
#pragma unroll 1
  for (unsigned t = thread_of_block(); t < count; t += kThreads) {
    scores.set(t, key.get(t) + weight * value.get(t) + static_cast<Real>(count) * scores.get(t));
  }
}

}  // namespace lagkv::cuda
