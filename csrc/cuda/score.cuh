// From the rows of a partition to the scores of its tokens.
//
// A pass over one partition of one tensor: its rows are scored against the reference of the next partition
// (bounds or anchor) and make the reference for the partition before. Each element is read once (WideRow: a
// few times, from cache). Then, for key and value together (docs/method.md 1, step 5, and 2):
//
//   std:     score = softmax_t(s_K) + w softmax_t(s_V)
//   cosine:  score = z(s_K) + w z(s_V),  z = (s - mean) / std over the partition, unbiased, 0 where std = 0
//   or L = 1
//
// in two reductions over the block; nothing leaves the block.
#pragma once

#include "cosine_statistic.cuh"
#include "std_statistic.cuh"

namespace lagkv::cuda {

template <class Layout, Score kScore>
struct StatisticFor {
  static_assert(kScore != Score::kBlend, "a blend visits both (blend_statistic.cuh)");
  using Type = std::conditional_t<kScore == Score::kStd, StdStatistic<Layout>, CosineStatistic<Layout>>;
};
template <class T, Score kScore>
struct StatisticFor<WideRow<T>, kScore> {
  using Type = std::conditional_t<kScore == Score::kStd, WideStdStatistic<T>, WideCosineStatistic<T>>;
};

/// The rows of one partition of one head of one tensor, row_stride apart.
template <class T_>
struct StridedTile {
  using T = T_;
  const T* rows;
  int64_t row_stride, dim;
  RealOf<T> inverse_dim;
  int count;

  __device__ __forceinline__ const T* row(int t) const { return rows + t * row_stride; }

  /// Goes from row to row, `step` rows at a time, in one channel.
  template <unsigned step>
  struct Walk {
    const T* own;
    int64_t stride;
    __device__ __forceinline__ Walk(const StridedTile& tile, int first, int channel)
        : own(tile.rows + first * tile.row_stride + channel), stride(step * tile.row_stride) {}
    __device__ __forceinline__ const T* next(int /*channel*/, bool /*exists*/) {
      const T* const now = own;
      if constexpr (sizeof(T) < sizeof(double)) {
        own = opaque(own + stride);  // one addition a row, not one of its multiple to the round's first row
      } else {
        own += opaque(stride);  // with addresses that wait for one another bounds_kernel spills on sm_80
      }
      return now;
    }
  };
};

/// The same where rows lie anywhere: where each of them is has been stored before.
template <class T_>
struct ScatteredTile {
  using T = T_;
  Store<const T*> rows;  // [count]
  int64_t dim;
  RealOf<T> inverse_dim;
  int count;

  __device__ __forceinline__ const T* row(int t) const { return rows.get(t); }

  template <unsigned step>
  struct Walk {
    Store<const T*> own;
    __device__ __forceinline__ Walk(const ScatteredTile& tile, int first, int /*channel*/)
        : own(tile.rows + first) {}
    __device__ __forceinline__ const T* next(int channel, bool exists) {
      const T* const now = exists ? own.get(0) + channel : nullptr;
      own = own + step;
      return now;
    }
  };
};

/// Memory of a pass.
template <class Real>
struct PassStores {
  Store<Real> reference;  // [3, D] or anchor [D]: of the next partition before the pass, of this one after it
  Store<Real> statistics;  // [L]: filled by the pass
  Store<Real> norms;       // [L]: WideRow, cosine
  void* partial;           // [warps, ...] shared: not WideRow
  Real* reduction;         // [2 * kWarps] shared: WideRow
};

/// Streams rows of a partition: one thread's part of a pass of a streaming layout.
template <class Layout, Score kScore, bool kScored, class Tile>
struct Stream {
  using Real = typename Layout::Real;
  using Statistic = typename StatisticFor<Layout, kScore>::Type;

  typename Layout::Seat seat;
  Statistic statistic;
  typename Tile::template Walk<Layout::kRowsPerPass> rows;
  Store<Real> result;  // of the row of the round that this lane owns
  int dim;
  Real check;  // NaN once a statistic of this thread is not finite

  __device__ __forceinline__ Stream(const Tile& tile, const PassStores<Real>& stores)
      : statistic(tile.inverse_dim),
        rows(tile, seat.first, seat.channel(0)),
        result(stores.statistics + seat.owned_row()),
        dim(static_cast<int>(tile.dim)),
        check(0) {
    if constexpr (kScored) statistic.load(stores.reference, dim, seat);
  }

  /// The next kRowsPerRound rows, of which `left` exist; `whole`: all of them.
  template <bool whole>
  __device__ __forceinline__ void round(int left) {
    typename Layout::Values x[Layout::kFlight];
    bool exists[Layout::kFlight];
#pragma unroll
    for (int n = 0; n < Layout::kFlight; ++n) {
      exists[n] = whole || seat.first + n * Layout::kRowsPerPass < left;
      x[n] = Layout::load(rows.next(opaque(seat.lane) * Layout::kElements, exists[n]), dim, exists[n], seat);
    }
    const Real s = statistic.template visit<kScored>(x, exists, dim, seat);
    if constexpr (kScored) {
      const bool owned = whole || seat.owned_row() < left;
      if (owned && seat.owns()) result.set(0, s);
      if (Statistic::kRepairs && owned) check = fused(s, Real(0), check);
    }
    result = result + Layout::kRowsPerRound;
  }
};

/// Streams the rows of a partition: statistics, and every warp's share of the new reference where it is
/// wanted. Returns whether a statistic of this thread needs repair. A `Run` has tile(side, partition) and
/// stores(side), which are asked again in each phase: nothing of them stays in registers while rows stream.
template <class Layout, Score kScore, bool kScored, class Run>
__device__ __forceinline__ bool stream_rows(const Run& run, int side, int partition) {
  using Statistic = typename StatisticFor<Layout, kScore>::Type;
  Stream<Layout, kScore, kScored, typename Run::Tile> stream(run.tile(side, partition), run.stores(side));
  // Every thread takes as many rounds, so that all lanes of a warp take part in the shuffles.
  unsigned rounds = static_cast<unsigned>(run.count()) / Layout::kRowsPerRound;  // whole ones that are left
  bool first = true;
  do {
    unsigned panel = Statistic::kPanel == 0 || rounds < Statistic::kPanel ? rounds : Statistic::kPanel;
    rounds -= panel;
#pragma unroll 1
    for (; panel > 0; --panel) stream.template round<true>(0);
    const int left = run.count() % Layout::kRowsPerRound;
    if (rounds == 0 && left > 0) stream.template round<false>(left);
    if (run.makes_reference(partition)) {
      auto* partial = static_cast<typename Statistic::Partial*>(run.stores(side).partial);
      const int dim = static_cast<int>(run.dim(side));
      stream.statistic.share(partial + Place().warp * Statistic::kPartials * dim, dim, first, stream.seat);
    }
    first = false;
  } while (rounds > 0);
  return !is_finite(stream.check);
}

/// Computes rows whose sum of squares is not finite again and exactly.
template <class Tile, class Real>
__device__ __forceinline__ void repair_deviations(const Tile& tile, const PassStores<Real>& stores) {
  const Place place;
#pragma unroll 1
  for (int t = place.warp; t < tile.count; t += kWarps) {
    if (is_finite(stores.statistics.get(t))) continue;
    const Real s = exact_deviation(tile.row(t), tile.dim, Bounds<Real>(stores.reference, tile.dim));
    __syncwarp();
    if (place.lane == 0) stores.statistics.set(t, -s);
  }
}

/// The whole pass. On return every thread sees the statistics and the new reference, whichever was wanted. A
/// `Run` has tile(side, partition) and stores(side), which are asked again in each phase: nothing of them
/// stays in registers while rows stream.
template <class Layout, Score kScore, class Run>
__device__ __forceinline__ void visit_partition(const Run& run, int side, int partition) {
  using Real = typename Layout::Real;
  using Statistic = typename StatisticFor<Layout, kScore>::Type;
  bool repair = false;
  if constexpr (Layout::kWide) {
    const auto tile = run.tile(side, partition);
    const PassStores<Real> stores = run.stores(side);
    const Place place;
    for (int t = place.warp; run.scores(partition) && t < tile.count; t += kWarps) {
      const Real s = Statistic::of_row(tile.row(t), tile.dim, stores.reference);
      if (place.lane == 0) stores.statistics.set(t, s);
      repair |= Statistic::kRepairs && !is_finite(s);
    }
  } else {
    repair = run.scores(partition) ? stream_rows<Layout, kScore, true>(run, side, partition)
                                   : stream_rows<Layout, kScore, false>(run, side, partition);
  }
  repair = __syncthreads_or(repair);
  if constexpr (Statistic::kRepairs) {
    if (repair) {
      repair_deviations(run.tile(side, partition), run.stores(side));
      __syncthreads();
    }
  }
  if (!run.makes_reference(partition))
    return;  // the same for all threads; the barrier above was the last one
  const auto tile = run.tile(side, partition);
  const PassStores<Real> stores = run.stores(side);
  if constexpr (Layout::kWide) {
    Statistic::make_reference(tile, stores.reference, stores.norms, stores.reduction);
  } else {
    const int dim = static_cast<int>(tile.dim);
#pragma unroll 1
    for (int channel = thread_of_block(); channel < dim; channel += kThreads) {
      Statistic::gather(static_cast<const typename Statistic::Partial*>(stores.partial), dim, channel,
                        stores.reference, tile.count);
    }
  }
  __syncthreads();
}

/// z of a token that lies `off` from the mean of `count` tokens with this deviation.
template <class Real>
__device__ __forceinline__ Real standardised(Real off, Real spread, int count) {
  return count == 1 || spread == Real(0) ? Real(0) : off / spread;
}

/// Statistics [L] of key and value on entry; on return `key` holds the scores, each written by the thread
/// that owns its token (t = thread of the block + a multiple of kThreads). `reduction` [2, 2 * kWarps]
/// shared. All threads have passed a barrier after the last read of another thread's statistic.
template <Score kScore, class Real>
__device__ __forceinline__ void combine_scores(const Store<Real>& key, const Store<Real>& value, int length,
                                               int64_t key_dim, int64_t value_dim, Real weight,
                                               Real* reduction) {
  const unsigned count = length, thread = thread_of_block();
  // Few tokens per thread: registers matter more than unrolled loops.
  if constexpr (kScore == Score::kStd) {
    KeyValue<Real> most{infinity<Real>(1), infinity<Real>(1)};
#pragma unroll 1
    for (unsigned t = thread; t < count; t += kThreads) {
      const KeyValue<Real> s{deviation(key.get(t), key_dim), deviation(value.get(t), value_dim)};
      key.set(t, s.key);
      value.set(t, s.value);
      most = {larger(most.key, s.key), larger(most.value, s.value)};
    }
    most = block_reduce<true>(most, reduction);
    // A NaN or an infinity makes the sum NaN, and with it every score of the partition, as torch.softmax
    // does.
    KeyValue<Real> sum{0, 0};
#pragma unroll 1
    for (unsigned t = thread; t < count; t += kThreads) {
      const KeyValue<Real> e{exponential(key.get(t) - most.key), exponential(value.get(t) - most.value)};
      key.set(t, e.key);
      value.set(t, e.value);
      sum = {sum.key + e.key, sum.value + e.value};
    }
    sum = block_reduce<false>(sum, reduction + 2 * kWarps);
#pragma unroll 1
    for (unsigned t = thread; t < count; t += kThreads)
      key.set(t, key.get(t) / sum.key + weight * (value.get(t) / sum.value));
  } else {
    // Relative to the first token's, so that equal statistics have a deviation of exactly 0.
    const KeyValue<Real> origin{key.get(0), value.get(0)};
    KeyValue<Real> mean{0, 0};
#pragma unroll 1
    for (unsigned t = thread; t < count; t += kThreads) {
      mean = {mean.key + (key.get(t) - origin.key), mean.value + (value.get(t) - origin.value)};
    }
    mean = block_reduce<false>(mean, reduction);
    mean = {mean.key / static_cast<Real>(count), mean.value / static_cast<Real>(count)};
    KeyValue<Real> squares{0, 0};
#pragma unroll 1
    for (unsigned t = thread; t < count; t += kThreads) {
      const KeyValue<Real> off{(key.get(t) - origin.key) - mean.key,
                               (value.get(t) - origin.value) - mean.value};
      squares = {squares.key + off.key * off.key, squares.value + off.value * off.value};
    }
    squares = block_reduce<false>(squares, reduction + 2 * kWarps);
    const Real others = static_cast<Real>(length - 1);
    const KeyValue<Real> spread{square_root(squares.key / others), square_root(squares.value / others)};
#pragma unroll 1
    for (unsigned t = thread; t < count; t += kThreads) {
      const KeyValue<Real> off{(key.get(t) - origin.key) - mean.key,
                               (value.get(t) - origin.value) - mean.value};
      key.set(t, standardised(off.key, spread.key, length) +
                     weight * standardised(off.value, spread.value, length));
    }
  }
}

}  // namespace lagkv::cuda
