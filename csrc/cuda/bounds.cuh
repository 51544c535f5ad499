// partition_bounds: lo[b, h, p, c] = min_t X[start + p L + t, c], hi likewise the maximum; NaN where the
// channel has a NaN. Traffic: every element of the full partitions once; writes [B, H, P, 2, D]. A block
// takes one partition of one head.
#pragma once

#include "partition.cuh"

namespace lagkv::cuda {

template <class T>
struct BoundsLaunch {
  BoundsParams<T, RealOf<T>> args;
  BoundsPlan plan;
  int64_t first_job;
};

template <class Layout>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const BoundsLaunch<typename Layout::T> launch) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  const auto& args = launch.args;
  const int count = static_cast<int>(args.lag_size);
  const int64_t dim = args.x.dim;
  const int64_t job = launch.first_job + blockIdx.x;
  const int64_t head = job / launch.plan.partitions, partition = job % launch.plan.partitions;
  const T* rows =
      args.x.slot(head / args.heads, head % args.heads).row(args.start + partition * args.lag_size);
  const Tile<T> tile{rows, args.x.row_stride, dim, Real(0), count};
  Real* lo = args.bounds + job * 2 * dim;
  const auto write = [&](int64_t channel, const Range<T>& range) {
    st_global(lo + channel, Real(to_real(range.lo)));
    st_global(lo + dim + channel, Real(to_real(range.hi)));
  };
  if constexpr (Layout::kWide) {
    for (int64_t c = thread_of_block(); c < dim; c += kThreads) write(c, column_range<T>(tile, c));
  } else {
    LAGKV_DYNAMIC_SHARED(shared);
    T* partial = reinterpret_cast<T*>(shared);
    const PassStores<Real> stores{{}, {}, {}, partial, nullptr};
    stream_rows<Layout, Score::kStd>(tile, {false, true}, stores);
    __syncthreads();
    for (int c = thread_of_block(); c < dim; c += kThreads)
      write(c, gathered_range(partial, static_cast<int>(dim), c));
  }
}

}  // namespace lagkv::cuda
