// One pass over one partition of one tensor: its rows are scored against the reference of the next partition
// (bounds or anchor) and make the reference for the partition before. Each element is read once (WideRow:
// see wide_rows.cuh).
#pragma once

#include "wide_rows.cuh"

namespace lagkv::cuda {

template <class Layout, Score kScore>
using TermsOf = std::conditional_t<kScore == Score::kStd, StdTerms<Layout>, CosineTerms<Layout>>;

/// The rows of one partition of one head of one tensor, row_stride apart.
template <class T>
struct Tile {
  const T* rows;
  int64_t row_stride, dim;
  RealOf<T> share_of_one;  // 1/D
  int count;

  __device__ __forceinline__ const T* row(int t) const { return rows + t * row_stride; }

  /// Goes from row to row, `step` rows at a time, in one channel.
  template <unsigned step>
  struct Walk {
    const T* own;
    int64_t stride;
    __device__ __forceinline__ Walk(const Tile& tile, int first, int channel)
        : own(tile.rows + first * tile.row_stride + channel), stride(step * tile.row_stride) {}
    __device__ __forceinline__ const T* next(unsigned /*t*/, bool /*exists*/) {
      const T* const now = own;
      own += stride;
      return now;
    }
  };
};

/// The same where rows lie anywhere: where each of them is has been stored before.
template <class T>
struct ScatteredTile {
  Store<const T*> rows;  // [count]
  int64_t dim;
  RealOf<T> share_of_one;
  int count;

  __device__ __forceinline__ const T* row(int t) const { return rows.get(t); }

  template <unsigned step>
  struct Walk {
    Store<const T*> rows;
    int channel;
    __device__ __forceinline__ Walk(const ScatteredTile& tile, int /*first*/, int channel)
        : rows(tile.rows), channel(channel) {}
    __device__ __forceinline__ const T* next(unsigned t, bool exists) {
      return exists ? rows.get(t) + channel : nullptr;
    }
  };
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
template <class AnyTile, class Real>
__device__ __forceinline__ void repair_deviations(const AnyTile& tile, const PassStores<Real>& stores) {
  const Place place;
#pragma unroll 1
  for (int t = place.warp; t < tile.count; t += kWarps) {
    if (is_finite(stores.statistics.get(t))) continue;
    const Real s = exact_deviation(tile.row(t), tile.dim, Bounds<Real>(stores.reference, tile.dim));
    __syncwarp();
    if (place.lane == 0) stores.statistics.set(t, -s);
  }
}

/// Streams the rows: statistics and every warp's share of the new reference, as `aim` says. Returns whether
/// a statistic of this thread needs repair.
template <class Layout, Score kScore, class AnyTile>
__device__ __forceinline__ bool stream_rows(const AnyTile& tile, Aim aim,
                                            const PassStores<typename Layout::Real>& stores) {
  using Terms = TermsOf<Layout, kScore>;
  const int dim = static_cast<int>(tile.dim);
  const typename Layout::Seat seat;
  Terms terms(tile.share_of_one);
  if (aim.scores) terms.load(stores.reference, dim, seat);
  bool repair = false;
  constexpr unsigned kStep = Layout::kRowsPerPass, kRound = kStep * Layout::kFlight;
  const unsigned count = tile.count;
  typename AnyTile::template Walk<kStep> walk(tile, seat.first, seat.channel(0));
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
      const unsigned row = t + n * kStep;
      x[n] = Layout::load(walk.next(row, row < count), dim, row < count, seat);
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
  using Real = typename Layout::Real;
  bool repair = false;
  if constexpr (Layout::kWide) {
    const auto x = tile();
    const PassStores<Real> to = stores();
    const Place place;
    for (int t = place.warp; aim.scores && t < x.count; t += kWarps) {
      const Real s = wide_statistic<kScore>(x.row(t), x.dim, to.reference);
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
  const auto x = tile();
  const PassStores<Real> to = stores();
  if constexpr (Layout::kWide) {
    wide_reference<kScore, typename Layout::T>(x, to.reference, to.norms, to.slots);
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
