// partition_bounds: lo[b, h, p, c] = min_t X[start + p L + t, c], hi likewise the maximum; NaN where the channel has a NaN.
// Traffic: every element of the full partitions once; writes [B, H, P, 2, D]. A block takes one partition of one head.
#pragma once

#include "partition.cuh"

namespace lagkv::cuda {

template <class T>
struct BoundsLaunch {
  BoundsParams<T, RealOf<T>> args;
  BoundsPlan plan;
};

template <class Layout>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const BoundsLaunch<typename Layout::T> launch) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  const auto& args = launch.args;
  const int count = static_cast<int>(args.lag_size);
  const int64_t dim = args.x.dim;
  for (int64_t job = blockIdx.x; job < launch.plan.blocks; job += gridDim.x) {
    const int64_t head = job / launch.plan.partitions, partition = job % launch.plan.partitions;
    const T* rows = args.x.row(head / args.heads, head % args.heads, args.start + partition * args.lag_size);
    Real* lo = args.bounds + job * 2 * dim;
    if constexpr (Layout::kWide) {
      for (int64_t c = threadIdx.x; c < dim; c += blockDim.x) {
        const Range<T> range = column_range(rows + c, args.x.row_stride, count);
        st_global(lo + c, Real(to_real(range.lo)));
        st_global(lo + dim + c, Real(to_real(range.hi)));
      }
    } else {
      LAGKV_DYNAMIC_SHARED(shared);
      T* partial = reinterpret_cast<T*>(shared);
      const PassStores<Real> stores{{}, {}, {}, partial, nullptr};
      stream_rows<Layout, Score::kStd>({rows, args.x.row_stride, dim, count}, {false, true}, stores);
      __syncthreads();
      for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        const Range<T> range = gathered_range(partial, static_cast<int>(dim), c);
        st_global(lo + c, Real(to_real(range.lo)));
        st_global(lo + dim + c, Real(to_real(range.hi)));
      }
      __syncthreads();  // before the next job writes its shares
    }
  }
}

}  // namespace lagkv::cuda
