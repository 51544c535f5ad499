// One pass over one partition of one tensor: its rows are scored against the reference of the next partition (bounds or
// anchor) and make the reference for the partition before. Each element is read once (WideRow: see wide_rows.cuh).
#pragma once

#include "wide_rows.cuh"

namespace lagkv::cuda {

template <class Layout, Score kScore>
using TermsOf = std::conditional_t<kScore == Score::kStd, StdTerms<Layout>, CosineTerms<Layout>>;

/// The rows of one partition of one head of one tensor.
template <class T>
struct Tile {
  const T* rows;
  int64_t row_stride, dim;
  int count;
};

/// What a pass is for: statistics of the rows, a reference for the partition before, or both.
struct Aim {
  bool scores, reference;
};

/// What a pass works with besides the rows.
template <class Real>
struct PassStores {
  Store<Real> reference;   // [3, D] or anchor [D]: of the next partition before the pass, of this one after it
  Store<Real> statistics;  // [L]: filled by the pass
  Store<Real> inverses;    // [L]: WideRow, cosine
  void* partial;           // [warps, ...] shared: not WideRow
  Real* slots;             // [2 * kMaxWarps] shared
};

/// Streams the rows: statistics and every warp's share of the new reference, as `aim` says. Returns whether a statistic of
/// this thread needs repair.
template <class Layout, Score kScore>
__device__ __forceinline__ bool stream_rows(const Tile<typename Layout::T>& tile, Aim aim,
                                            const PassStores<typename Layout::Real>& stores) {
  using Terms = TermsOf<Layout, kScore>;
  const int dim = static_cast<int>(tile.dim);
  Terms terms(dim);
  if (aim.scores) terms.load(stores.reference, dim);
  bool repair = false;
  const unsigned step = Layout::rows_per_pass(), count = tile.count;
  // The bound is the same for all threads of a warp, so that all of them take part in the shuffles.
  for (unsigned base = 0; base < count; base += step * Layout::kFlight) {
    typename Layout::Values x[Layout::kFlight];
#pragma unroll
    for (int n = 0; n < Layout::kFlight; ++n) {
      const unsigned t = base + n * step + Layout::first();
      x[n] = Layout::load(tile.rows + t * tile.row_stride, dim, t < count);
    }
#pragma unroll
    for (int n = 0; n < Layout::kFlight; ++n) {
      const unsigned t = base + n * step + Layout::first();
      const auto s = terms.visit(x[n], dim, t < count, aim.scores);
      if (aim.scores && t < count && Layout::lane() == 0) {
        stores.statistics.set(t, s);
        repair |= kScore == Score::kStd && !is_finite(s);
      }
    }
  }
  auto* partial = static_cast<typename Terms::Partial*>(stores.partial);
  if (aim.reference) terms.share(partial + warp_of_block() * Terms::kPartials * dim, dim);
  return repair;
}

/// The whole pass. On return every thread sees the statistics and the new reference, whichever was wanted.
template <class Layout, Score kScore>
__device__ __forceinline__ void visit_partition(const Tile<typename Layout::T>& tile, Aim aim,
                                                const PassStores<typename Layout::Real>& stores) {
  using Real = typename Layout::Real;
  bool repair = false;
  if constexpr (Layout::kWide) {
    for (int t = warp_of_block(); aim.scores && t < tile.count; t += warps_of_block()) {
      const Real s = wide_statistic<kScore>(tile.rows + t * tile.row_stride, tile.dim, stores.reference);
      if (lane_of_warp() == 0) stores.statistics.set(t, s);
      repair |= kScore == Score::kStd && !is_finite(s);
    }
  } else {
    repair = stream_rows<Layout, kScore>(tile, aim, stores);
  }
  repair = __syncthreads_or(repair);
  if constexpr (kScore == Score::kStd) {
    if (repair) {
      repair_deviations(tile.rows, tile.row_stride, tile.dim, tile.count, Bounds<Real>(stores.reference, tile.dim),
                        stores.statistics);
      __syncthreads();
    }
  }
  if (!aim.reference) return;  // the same for all threads; the barrier above was the last one
  if constexpr (Layout::kWide) {
    wide_reference<kScore>(tile.rows, tile.row_stride, tile.dim, tile.count, stores.reference, stores.inverses, stores.slots);
  } else {
    using Terms = TermsOf<Layout, kScore>;
    const int dim = static_cast<int>(tile.dim);
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
      Terms::gather(static_cast<const typename Terms::Partial*>(stores.partial), dim, channel, stores.reference, tile.count);
    }
  }
  __syncthreads();
}

}  // namespace lagkv::cuda
