// partition_bounds: lo[b, h, p, c] = min_t X[start + p L + t, c], hi likewise the maximum; NaN where the
// channel has a NaN. Traffic: every element of the full partitions once; writes [B, H, P, 2, D]. A block
// takes one partition of one head.
#pragma once

#include "../params.h"
#include "score.cuh"

namespace lagkv::cuda {

template <class T>
struct BoundsLaunch {
  BoundsParams<T, RealOf<T>> args;
  BoundsPlan plan;
};

/// A block's partition, as stream_rows asks for it: the bounds alone.
template <class Layout>
struct BoundsRun {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Tile = StridedTile<T>;

  const BoundsLaunch<T>& launch;
  T* partial;  // [warps, 2, D] shared

  __device__ __forceinline__ bool makes_reference(int /*partition*/) const { return true; }
  __device__ __forceinline__ int count() const { return static_cast<int>(launch.args.lag_size); }
  __device__ __forceinline__ int64_t dim(int /*side*/ = 0) const { return launch.args.x.dim; }
  __device__ __forceinline__ Tile tile(int /*side*/ = 0, int /*partition*/ = 0) const {
    const auto& args = launch.args;
    const int64_t head = blockIdx.x / launch.plan.partitions, partition = blockIdx.x % launch.plan.partitions;
    const Rows<const T> rows = args.x.slot(head / args.heads, head % args.heads);
    return {rows.row(args.start + partition * args.lag_size), rows.row_stride, dim(), Real(0), count()};
  }
  __device__ __forceinline__ PassStores<Real> stores(int /*side*/) const {
    return {{}, {}, {}, partial, nullptr};
  }
};

template <class Layout>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const BoundsLaunch<typename Layout::T> launch) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  LAGKV_DYNAMIC_SHARED(shared);
  const BoundsRun<Layout> run{launch, reinterpret_cast<T*>(shared)};
  if constexpr (!Layout::kWide) {
    stream_rows<Layout, Score::kStd, false>(run, 0, 0);
    __syncthreads();
  }
  const int64_t dim = run.dim();
  Real* lo = launch.args.bounds + blockIdx.x * 2 * dim;
  for (int64_t c = thread_of_block(); c < dim; c += kThreads) {
    Range<T> range;
    if constexpr (Layout::kWide) {
      range = column_range(run.tile(), c);
    } else {
      range = gathered_range(run.partial, static_cast<int>(dim), static_cast<int>(c));
    }
    st_global(lo + c, Real(to_real(range.lo)));
    st_global(lo + dim + c, Real(to_real(range.hi)));
  }
}

}  // namespace lagkv::cuda
