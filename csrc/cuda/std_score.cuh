// The paper's statistic of a row against the bounds of the next partition (docs/method.md 1, steps 2 to 4):
//
//   y_c = (x_c - lo_c) / (hi_c - lo_c), 0 where hi_c = lo_c       s = sqrt(1/(D-1) sum_c (y_c - mean y)^2)
//
// While rows stream through registers, y is (x - lo) * scale with scale = 1/(hi - lo) or 0 (not x * scale +
// shift, which cancels where lo is far from 0), and the same rows widen the bounds of their own partition. A
// row whose sum of squares is not finite (NaN, infinity, a range below the smallest normal number, overflow)
// is computed again by the formula.
#pragma once

#include "rows.cuh"

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

template <class Layout>
struct StdTerms {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Access = typename Layout::Access;
  static constexpr int kPartials = 2;  // values of type Partial per channel and warp
  using Partial = T;

  Real lo[Layout::kChannels], scale[Layout::kChannels];
  Real share_of_one;  // 1/D
  Access least[Layout::kChunks], most[Layout::kChunks];

  __device__ __forceinline__ explicit StdTerms(Real share) : share_of_one(share) {
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

  __device__ __forceinline__ void load(const Store<Real>& reference, int dim,
                                       const typename Layout::Seat& seat) {
    const Bounds<Real> bounds(reference, dim);
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      if (seat.channel(chunk) >= dim) continue;
      get_row<Layout::kElements>(bounds.lo, seat.channel(chunk), lo + chunk * Layout::kElements);
      get_row<Layout::kElements>(bounds.scale, seat.channel(chunk), scale + chunk * Layout::kElements);
    }
  }

  /// sum_c (y_c - mean y)^2, known to every lane of the row; 0 where only the bounds are wanted. The row,
  /// where it exists, widens the bounds of its own partition.
  __device__ __forceinline__ Real visit(const typename Layout::Values& x, int dim, bool exists, bool scored,
                                        const typename Layout::Seat& seat) {
    if (exists) {
#pragma unroll
      for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
        least[chunk] = extreme<false, T, Layout::kElements>(least[chunk], x.chunk[chunk]);
        most[chunk] = extreme<true, T, Layout::kElements>(most[chunk], x.chunk[chunk]);
      }
    }
    return scored ? sum_of_squares(x, dim, seat) : Real(0);
  }

  static constexpr unsigned kShareRounds = 0;  // minimum and maximum are exact: shared once, at the end

  /// This warp's bounds to shared memory, [2, D] of `partial`.
  __device__ __forceinline__ void share(T* partial, int dim, bool /*first*/,
                                        const typename Layout::Seat& seat) {
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

  /// One channel of the new bounds from the warps' shares.
  static __device__ __forceinline__ void gather(const T* partial, int dim, int channel,
                                                const Store<Real>& reference, int64_t /*rows*/) {
    const Range<T> range = gathered_range(partial, dim, channel);
    Bounds<Real>(reference, dim).set(channel, to_real(range.lo), to_real(range.hi));
  }

 private:
  __device__ __forceinline__ Real sum_of_squares(const typename Layout::Values& x, int dim,
                                                 const typename Layout::Seat& seat) const {
    Real y[Layout::kChannels];
    Layout::unpack_row(x, y);
    Real sum = 0;
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) {
      y[c] = (y[c] - lo[c]) * scale[c];
      sum += y[c];
    }
    const Real mean = lanes_sum<Layout::kLanes>(sum) * share_of_one;
    Real squares = 0;
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) {
      const Real off = y[c] - mean;
      if (seat.channel(c / Layout::kElements) < dim) squares += off * off;
    }
    return lanes_sum<Layout::kLanes>(squares);
  }

  static __device__ __forceinline__ Access shuffled(Access x, int offset) {
#pragma unroll
    for (auto& word : x.data) word = __shfl_xor_sync(kFullWarp, word, offset);
    return x;
  }
};

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

}  // namespace lagkv::cuda
