// One pass over one partition of one tensor: its rows are scored against the reference of the next partition
// (bounds or anchor) and make the reference for the partition before. Each element is read once (WideRow:
// see wide_rows.cuh).
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
  RealOf<T> share_of_one;  // 1/D
  int count;
};

/// What a pass is for: statistics of the rows, a reference for the partition before, or both.
struct Aim {
  bool scores, reference;
};

/// What a pass works with besides the rows.
template <class Real>
struct PassStores {
  Store<Real> reference;  // [3, D] or anchor [D]: of the next partition before the pass, of this one after it
  Store<Real> statistics;  // [L]: filled by the pass
  Store<Real> norms;       // [L]: WideRow, cosine
  void* partial;           // [warps, ...] shared: not WideRow
  Real* slots;             // [2 * kWarps] shared
};

/// Rows whose sum of squares is not finite, again and exactly.
template <class T, class Real>
__device__ __forceinline__ void repair_deviations(const Tile<T>& tile, const PassStores<Real>& stores) {
  const Place place;
#pragma unroll 1
  for (int t = place.warp; t < tile.count; t += kWarps) {
    if (is_finite(stores.statistics.get(t))) continue;
    const Real s =
        exact_deviation(tile.rows + t * tile.row_stride, tile.dim, Bounds<Real>(stores.reference, tile.dim));
    __syncwarp();
    if (place.lane == 0) stores.statistics.set(t, -s);
  }
}

/// Streams the rows: statistics and every warp's share of the new reference, as `aim` says. Returns whether
/// a statistic of this thread needs repair.
template <class Layout, Score kScore>
__device__ __forceinline__ bool stream_rows(const Tile<typename Layout::T>& tile, Aim aim,
                                            const PassStores<typename Layout::Real>& stores) {
  using Terms = TermsOf<Layout, kScore>;
  const int dim = static_cast<int>(tile.dim);
  const typename Layout::Seat seat;
  Terms terms(tile.share_of_one);
  if (aim.scores) terms.load(stores.reference, dim, seat);
  bool repair = false;
  constexpr unsigned kStep = Layout::kRowsPerPass, kRound = kStep * Layout::kFlight;
  const unsigned count = tile.count;
  const auto* own = tile.rows + seat.first * tile.row_stride + seat.channel(0);
  unsigned t = seat.first;
  auto* partial = static_cast<typename Terms::Partial*>(stores.partial);
  const auto share = [&](bool first) {
    terms.share(partial + Place().warp * Terms::kPartials * dim, dim, first, seat);
  };
  bool shared_none = true;
  // As many rounds for every thread, so that all lanes of a warp take part in the shuffles.
#pragma unroll 1
  for (unsigned rounds = (count + kRound - 1) / kRound; rounds > 0; --rounds) {
    if constexpr (Terms::kShareRounds > 0) {
      if (rounds % Terms::kShareRounds == 0 && aim.reference) {
        share(shared_none);
        shared_none = false;
      }
    }
    typename Layout::Values x[Layout::kFlight];
#pragma unroll
    for (unsigned n = 0; n < Layout::kFlight; ++n) {
      x[n] = Layout::load(own, dim, t + n * kStep < count, seat);
      own += kStep * tile.row_stride;
    }
#pragma unroll
    for (unsigned n = 0; n < Layout::kFlight; ++n) {
      const bool exists = t < count;
      const auto s = terms.visit(x[n], dim, exists, aim.scores, seat);
      if (aim.scores && exists && seat.lane == 0) {
        stores.statistics.set(t, s);
        repair |= kScore == Score::kStd && !is_finite(s);
      }
      t += kStep;
    }
  }
  if (aim.reference) share(shared_none);
  return repair;
}

/// The whole pass. On return every thread sees the statistics and the new reference, whichever was wanted.
/// `tile()` and `stores()` are asked again in each phase: what they return need not stay in registers while
/// rows stream.
template <class Layout, Score kScore, class MakeTile, class MakeStores>
__device__ __forceinline__ void visit_partition(Aim aim, const MakeTile& tile, const MakeStores& stores) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  bool repair = false;
  if constexpr (Layout::kWide) {
    const Tile<T> x = tile();
    const PassStores<Real> to = stores();
    const Place place;
    for (int t = place.warp; aim.scores && t < x.count; t += kWarps) {
      const Real s = wide_statistic<kScore>(x.rows + t * x.row_stride, x.dim, to.reference);
      if (place.lane == 0) to.statistics.set(t, s);
      repair |= kScore == Score::kStd && !is_finite(s);
    }
  } else {
    repair = stream_rows<Layout, kScore>(tile(), aim, stores());
  }
  repair = __syncthreads_or(repair);
  if constexpr (kScore == Score::kStd) {
    if (repair) {
      repair_deviations(tile(), stores());
      __syncthreads();
    }
  }
  if (!aim.reference) return;  // the same for all threads; the barrier above was the last one
  const Tile<T> x = tile();
  const PassStores<Real> to = stores();
  if constexpr (Layout::kWide) {
    wide_reference<kScore>(x.rows, x.row_stride, x.dim, x.count, to.reference, to.norms, to.slots);
  } else {
    using Terms = TermsOf<Layout, kScore>;
    const int dim = static_cast<int>(x.dim);
#pragma unroll 1
    for (int channel = thread_of_block(); channel < dim; channel += kThreads) {
      Terms::gather(static_cast<const typename Terms::Partial*>(to.partial), dim, channel, to.reference,
                    x.count);
    }
  }
  __syncthreads();
}

}  // namespace lagkv::cuda
