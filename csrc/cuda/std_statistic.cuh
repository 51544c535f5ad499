// The paper's statistic of a row against the bounds of the next partition (docs/method.md 1, steps 2 to 4):
//
//   y_c = (x_c - lo_c) / (hi_c - lo_c), 0 where hi_c = lo_c       s = sqrt(1/(D-1) sum_c (y_c - mean y)^2)
//
// While rows stream through registers, y is (x - lo) * scale with scale = 1/(hi - lo) or 0 (not x * scale +
// shift, which cancels where lo is far from 0), and the same rows widen the bounds of their own partition. A
// row whose sum of squares is not finite (NaN, infinity, a range below the smallest normal number, overflow)
// is computed again by the formula.
#pragma once

#include "layout.cuh"

namespace lagkv::cuda {

/// The next partition's bounds as the kernels hold them: [3, D] lo, hi, scale.
template <class Real>
struct Bounds {
  Store<Real> lo, hi, scale;
  __device__ __forceinline__ Bounds(const Store<Real>& reference, int64_t dim)
      : lo(reference), hi(reference + dim), scale(reference + 2 * dim) {}

  __device__ __forceinline__ void set(int64_t channel, Real low, Real high) const {
    lo.set(channel, low);
    hi.set(channel, high);
    scale.set(channel, low == high ? Real(0) : Real(1) / (high - low));
  }
};

template <class T>
struct Range {
  T lo, hi;
};

/// Bounds of one channel from the shares of the warps, `partial` [warps, 2, D].
template <class T>
__device__ __forceinline__ Range<T> gathered_range(const T* partial, int dim, int channel) {
  Range<T> range{ld_shared(partial + channel), ld_shared(partial + dim + channel)};
  for (int warp = 1; warp < kWarps; ++warp) {
    partial += 2 * dim;
    range = {min_nan(range.lo, ld_shared(partial + channel)),
             max_nan(range.hi, ld_shared(partial + dim + channel))};
  }
  return range;
}

/// sqrt of the unbiased variance. A row that was computed again left its result negated, where a sum of
/// squares cannot be.
template <class Real>
__device__ __forceinline__ Real deviation(Real squares, int64_t dim) {
  if (dim == 1) return Real(0);
  if (dim == 0) return not_a_number<Real>();
  return squares < Real(0) ? -squares : square_root(squares / static_cast<Real>(dim - 1));
}

/// The formula as it stands, by one warp for one row: true division, y = 0 in a channel of equal bounds
/// whatever x is, sums in double. Every lane gets it.
template <class T, class Real>
__device__ inline Real exact_deviation(const T* row, int64_t dim, const Bounds<Real>& bounds) {
  const int lane = Place().lane;
  const auto y = [&](int64_t c) {
    const Real low = bounds.lo.get(c), high = bounds.hi.get(c);
    return low == high ? 0.0 : static_cast<double>((to_real(ld_global_nc(row + c)) - low) / (high - low));
  };
  double sum = 0, squares = 0;
#pragma unroll 1
  for (int64_t c = lane; c < dim; c += 32) sum += y(c);
  const double mean = lanes_sum<32>(sum) / static_cast<double>(dim);
#pragma unroll 1
  for (int64_t c = lane; c < dim; c += 32) {
    const double off = y(c) - mean;
    squares += off * off;
  }
  return static_cast<Real>(sqrt(lanes_sum<32>(squares) / static_cast<double>(dim - 1)));
}

/// In registers of a streaming layout: the next partition's bounds, and those of the rows seen so far.
template <class Layout>
struct StdStatistic {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Access = typename Layout::Access;
  using Seat = typename Layout::Seat;
  static constexpr int kPartials = 2;  // values of type Partial per channel and warp
  using Partial = T;
  static constexpr unsigned kPanel = 0;  // one share alone: minimum and maximum are exact
  static constexpr bool kRepairs = true;
  // Rows of a round that are summed together: their y stay in registers from the mean to the squares.
  static constexpr int kTogether =
      Layout::kFlight * Layout::kChannels * sizeof(Real) <= 64 ? Layout::kFlight : (Layout::kFlight + 1) / 2;

  Real lo[Layout::kChannels], scale[Layout::kChannels];
  Real inverse_dim;
  Access least[Layout::kChunks], most[Layout::kChunks];

  __device__ __forceinline__ explicit StdStatistic(Real inverse_dim) : inverse_dim(inverse_dim) {
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
#pragma unroll
      for (int e = 0; e < Layout::kElements; ++e) {
        lo[chunk * Layout::kElements + e] = scale[chunk * Layout::kElements + e] = Real(0);
      }
      least[chunk] = filled<T, Layout::kElements>(infinity<T>(0));
      most[chunk] = filled<T, Layout::kElements>(infinity<T>(1));
    }
  }

  __device__ __forceinline__ void load(const Store<Real>& reference, int dim, const Seat& seat) {
    const Bounds<Real> bounds(reference, dim);
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      if (seat.channel(chunk) >= dim) continue;
      get_row<Layout::kElements>(bounds.lo, seat.channel(chunk), lo + chunk * Layout::kElements);
      get_row<Layout::kElements>(bounds.scale, seat.channel(chunk), scale + chunk * Layout::kElements);
    }
  }

  /// Rows of a round, which widen the bounds of their own partition. Returns sum_c (y_c - mean y)^2 of the
  /// row that this lane owns; 0 where rows are not scored.
  template <bool kScored>
  __device__ __forceinline__ Real visit(const typename Layout::Values (&x)[Layout::kFlight],
                                        const bool (&exists)[Layout::kFlight], int dim, const Seat& seat) {
    Real squares[Layout::kFlight];
#pragma unroll
    for (int first = 0; first < Layout::kFlight; first += kTogether) {
#pragma unroll
      for (int n = first; n < first + kTogether; ++n) {
        if (!exists[n]) continue;
#pragma unroll
        for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
          least[chunk] = extreme<false, T, Layout::kElements>(least[chunk], x[n].chunk[chunk]);
          most[chunk] = extreme<true, T, Layout::kElements>(most[chunk], x[n].chunk[chunk]);
        }
      }
      if constexpr (kScored) sum_squares(x + first, squares + first, dim, seat);
    }
    if constexpr (!kScored) return Real(0);
    return Layout::row_sum(squares, seat);
  }

  /// Writes this warp's bounds to shared memory, [2, D] of `partial`.
  __device__ __forceinline__ void share(T* partial, int dim, bool /*first*/, const Seat& seat) {
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      if constexpr (Layout::kLanes < 32) {
#pragma unroll
        for (int offset = Layout::kLanes; offset < 32; offset *= 2) {
          least[chunk] = extreme<false, T, Layout::kElements>(least[chunk], shuffled(least[chunk], offset));
          most[chunk] = extreme<true, T, Layout::kElements>(most[chunk], shuffled(most[chunk], offset));
        }
      }
      const int channel = seat.channel(chunk);
      if (Place().lane < Layout::kLanes && channel < dim) {
        st_shared(reinterpret_cast<Access*>(partial + channel), least[chunk]);
        st_shared(reinterpret_cast<Access*>(partial + dim + channel), most[chunk]);
      }
    }
  }

  /// Computes one channel of the new bounds from the warps' shares.
  static __device__ __forceinline__ void gather(const T* partial, int dim, int channel,
                                                const Store<Real>& reference, int64_t /*rows*/) {
    const Range<T> range = gathered_range(partial, dim, channel);
    Bounds<Real>(reference, dim).set(channel, to_real(range.lo), to_real(range.hi));
  }

 private:
  /// The lane's part of sum_c (y_c - mean y)^2 of kTogether rows. y is a product that is never rounded:
  /// four instructions per channel.
  __device__ __forceinline__ void sum_squares(const typename Layout::Values* x, Real* squares, int dim,
                                              const Seat& seat) {
    Real above[kTogether][Layout::kChannels], sum[kTogether];  // x - lo; sum of y
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      Layout::unpack_row(x[n], above[n]);
      sum[n] = 0;
#pragma unroll
      for (int c = 0; c < Layout::kChannels; ++c) {
        above[n][c] -= lo[c];
        sum[n] = fused(above[n][c], scale[c], sum[n]);
      }
    }
    const Real owned_mean = Layout::row_sum(sum, seat) * inverse_dim;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const Real mean = Layout::template of_row<kTogether>(owned_mean, n);
#pragma unroll
      for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
        Real part = 0;
#pragma unroll
        for (int c = chunk * Layout::kElements; c < (chunk + 1) * Layout::kElements; ++c) {
          const Real off = fused(above[n][c], scale[c], -mean);
          part = fused(off, off, part);
        }
        part = seat.channel(chunk) < dim ? part : Real(0);
        squares[n] = chunk == 0 ? part : squares[n] + part;
      }
    }
  }

  static __device__ __forceinline__ Access shuffled(Access x, int offset) {
#pragma unroll
    for (auto& word : x.data) word = __shfl_xor_sync(kFullWarp, word, offset);
    return x;
  }
};

// Rows of any length (WideRow): a warp takes a row and reads it once per sum, a thread takes a channel of the
// bounds and walks the rows of the partition. Slower than the streaming layouts (about three reads, most of
// them from cache), and always right: odd D, D beyond what lanes can hold, D = 0.

/// Bounds of one channel of a partition's rows, by one thread.
template <class Tile>
__device__ __forceinline__ Range<typename Tile::T> column_range(const Tile& tile, int64_t channel) {
  using T = typename Tile::T;
  const T first = ld_global_nc(tile.row(0) + channel);
  Range<T> range{first, first};
  for (int t = 1; t < tile.count; ++t) {
    const T x = ld_global_nc(tile.row(t) + channel);
    range = {min_nan(range.lo, x), max_nan(range.hi, x)};
  }
  return range;
}

template <class T>
struct WideStdStatistic {
  using Real = RealOf<T>;
  static constexpr bool kRepairs = true;

  /// sum_c (y_c - mean y)^2 of one row, by one warp; every lane gets it.
  static __device__ __forceinline__ Real of_row(const T* row, int64_t dim, const Store<Real>& reference) {
    const Bounds<Real> bounds(reference, dim);
    const int lane = Place().lane;
    Real sum = 0, squares = 0;
    for (int64_t c = lane; c < dim; c += 32)
      sum += (to_real(ld_global_nc(row + c)) - bounds.lo.get(c)) * bounds.scale.get(c);
    const Real mean = lanes_sum<32>(sum) / static_cast<Real>(dim);
    for (int64_t c = lane; c < dim; c += 32) {
      const Real off = (to_real(ld_global_nc(row + c)) - bounds.lo.get(c)) * bounds.scale.get(c) - mean;
      squares += off * off;
    }
    return lanes_sum<32>(squares);
  }

  /// Makes the bounds of the tile's rows. Ends without a barrier.
  template <class Tile>
  static __device__ __forceinline__ void make_reference(const Tile& tile, const Store<Real>& reference,
                                                        const Store<Real>& /*norms*/, Real* /*reduction*/) {
    for (int64_t c = thread_of_block(); c < tile.dim; c += kThreads) {
      const Range<T> range = column_range(tile, c);
      Bounds<Real>(reference, tile.dim).set(c, to_real(range.lo), to_real(range.hi));
    }
  }
};

}  // namespace lagkv::cuda
