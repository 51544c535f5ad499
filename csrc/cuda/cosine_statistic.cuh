// The cosine statistic (docs/method.md 2): direction u_t = x_t / |x_t| (0 where |x_t| = 0), anchor of the
// next partition a = mean_t u_t, s = -cos(x, a) = -(u . a / |a|). The same rows add to the anchor of their
// own partition.
#pragma once

#include "layout.cuh"

namespace lagkv::cuda {

__device__ __forceinline__ double quick_inverse(double x) { return 1.0 / x; }
__device__ __forceinline__ float quick_inverse(float x) {
#if defined(LAGKV_SIMT)
  return 1.0f / x;
#else
  return __fdividef(1.0f, x);  // norms are neither denormal nor above 2^64: no special cases
#endif
}

/// Divides a row by its norm: x * (1/norm) and one correction by the remainder, which rounds as a division
/// does. A row with one channel other than 0 has a direction of exactly 1 or -1, and tokens of one direction
/// tie.
template <class Real>
struct Norm {
  Real norm, inverse;

  __device__ __forceinline__ Norm(Real norm, Real inverse) : norm(norm), inverse(inverse) {}
  __device__ __forceinline__ explicit Norm(Real squares) : norm(square_root(squares)) {
    // An infinite norm divides to 0, and a norm of 0 is no direction at all.
    if (norm == infinity<Real>(0)) norm = Real(0);
    inverse = norm == Real(0) ? Real(0) : quick_inverse(norm);
  }
  __device__ __forceinline__ Real divide(Real x) const {
    const Real quotient = x * inverse;
    return fused(fused(-quotient, norm, x), inverse, quotient);
  }
};

/// In registers of a streaming layout: the next partition's anchor, and the directions of the rows seen so
/// far.
template <class Layout>
struct CosineStatistic {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Seat = typename Layout::Seat;
  static constexpr int kPartials = 1;
  using Partial = Real;
  // Sums in two levels: a lane's own of this many rounds, and their sum in `partial`. The error of a sum of
  // 65,536 directions one by one would show in the scores.
  static constexpr unsigned kPanel = 32;
  static constexpr bool kRepairs = false;

  Real anchor[Layout::kChannels], total[Layout::kChannels];

  __device__ __forceinline__ explicit CosineStatistic(Real /*inverse_dim*/) {
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) anchor[c] = total[c] = Real(0);
  }

  /// `reference` holds the anchor as it was summed; here it gets its norm of 1.
  __device__ __forceinline__ void load(const Store<Real>& reference, int dim, const Seat& seat) {
    Real squares = 0;
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      if (seat.channel(chunk) < dim) {
        get_row<Layout::kElements>(reference, seat.channel(chunk), anchor + chunk * Layout::kElements);
      }
    }
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) squares += anchor[c] * anchor[c];
    const Norm<Real> norm(lanes_sum<Layout::kLanes>(squares));
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) anchor[c] = norm.divide(anchor[c]);
  }

  /// Rows of a round, whose directions add to the anchor of their own partition. Returns s of the row that
  /// this lane owns; 0 where rows are not scored. A missing row is all zeros, has no direction and adds
  /// nothing.
  template <bool kScored>
  __device__ __forceinline__ Real visit(const typename Layout::Values (&x)[Layout::kFlight],
                                        const bool (& /*exists*/)[Layout::kFlight], int /*dim*/,
                                        const Seat& seat) {
    Real row[Layout::kFlight][Layout::kChannels], squares[Layout::kFlight], cosine[Layout::kFlight];
#pragma unroll
    for (int n = 0; n < Layout::kFlight; ++n) {
      Layout::unpack_row(x[n], row[n]);
      squares[n] = 0;
#pragma unroll
      for (int c = 0; c < Layout::kChannels; ++c) squares[n] += row[n][c] * row[n][c];
    }
    const Norm<Real> owned(Layout::row_sum(squares, seat));
#pragma unroll
    for (int n = 0; n < Layout::kFlight; ++n) {
      const Norm<Real> norm(Layout::template of_row<Layout::kFlight>(owned.norm, n),
                            Layout::template of_row<Layout::kFlight>(owned.inverse, n));
      cosine[n] = 0;
#pragma unroll
      for (int c = 0; c < Layout::kChannels; ++c) {
        const Real direction = norm.divide(row[n][c]);
        if constexpr (kScored) cosine[n] += direction * anchor[c];
        total[c] += direction;
      }
    }
    return kScored ? -Layout::row_sum(cosine, seat) : Real(0);
  }

  /// Adds this warp's directions to its sums in shared memory, [D] of `partial`, or starts them, and clears
  /// its own.
  __device__ __forceinline__ void share(Real* partial, int dim, bool first, const Seat& seat) {
    const Store<Real> sums{partial, false};
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      Real* own = total + chunk * Layout::kElements;
#pragma unroll
      for (int e = 0; e < Layout::kElements; ++e) {
#pragma unroll
        for (int offset = Layout::kLanes; offset < 32; offset *= 2)
          own[e] += __shfl_xor_sync(kFullWarp, own[e], offset);
      }
      const int channel = seat.channel(chunk);
      if (Place().lane < Layout::kLanes && channel < dim) {
        if (!first) {
          Real before[Layout::kElements];
          get_row<Layout::kElements>(sums, channel, before);
#pragma unroll
          for (int e = 0; e < Layout::kElements; ++e) own[e] += before[e];
        }
        set_row<Layout::kElements>(sums, channel, own);
      }
#pragma unroll
      for (int e = 0; e < Layout::kElements; ++e) own[e] = Real(0);
    }
  }

  /// Computes one channel of the new anchor from the warps' sums.
  static __device__ __forceinline__ void gather(const Real* partial, int dim, int channel,
                                                const Store<Real>& reference, int64_t rows) {
    Real sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += ld_shared(partial + warp * dim + channel);
    reference.set(channel, sum / static_cast<Real>(rows));
  }
};

// Rows of any length (WideRow), as WideStdStatistic: several reads of a row, most of them from cache.

template <class Real>
__device__ __forceinline__ Real divide_or_zero(Real x, Real divisor) {
  return divisor == Real(0) ? Real(0) : x / divisor;
}

template <class T>
struct WideCosineStatistic {
  using Real = RealOf<T>;
  static constexpr bool kRepairs = false;

  /// s of one row, by one warp; every lane gets it. `reference` is the anchor divided by its norm.
  static __device__ __forceinline__ Real of_row(const T* row, int64_t dim, const Store<Real>& reference) {
    const Real norm = norm_of(row, dim);
    Real cosine = 0;
    for (int64_t c = Place().lane; c < dim; c += 32)
      cosine += divide_or_zero(to_real(ld_global_nc(row + c)), norm) * reference.get(c);
    return -lanes_sum<32>(cosine);
  }

  /// Makes the anchor of the tile's rows. `norms` [rows] holds |x| of each; `reduction` [2 * kWarps] shared.
  /// Ends without a barrier.
  template <class Tile>
  static __device__ __forceinline__ void make_reference(const Tile& tile, const Store<Real>& reference,
                                                        const Store<Real>& norms, Real* reduction) {
    const Place place;
    for (int t = place.warp; t < tile.count; t += kWarps) {
      const Real norm = norm_of(tile.row(t), tile.dim);
      if (place.lane == 0) norms.set(t, norm);
    }
    __syncthreads();
    KeyValue<Real> squares{0, 0};
    for (int64_t c = thread_of_block(); c < tile.dim; c += kThreads) {
      Real sum = 0;
      constexpr int kPanel = 256;  // in two levels: the error of one long sum would show in the scores
      for (int panel = 0; panel < tile.count; panel += kPanel) {
        Real part = 0;
        for (int t = panel; t < tile.count && t < panel + kPanel; ++t) {
          part += divide_or_zero(to_real(ld_global_nc(tile.row(t) + c)), norms.get(t));
        }
        sum += part;
      }
      sum /= static_cast<Real>(tile.count);
      reference.set(c, sum);
      squares.key += sum * sum;
    }
    const Real norm = square_root(block_reduce<false>(squares, reduction).key);
    for (int64_t c = thread_of_block(); c < tile.dim; c += kThreads)
      reference.set(c, divide_or_zero(reference.get(c), norm));
  }

 private:
  /// |x|; every lane gets it.
  static __device__ __forceinline__ Real norm_of(const T* row, int64_t dim) {
    Real squares = 0;
    for (int64_t c = Place().lane; c < dim; c += 32) {
      const Real x = to_real(ld_global_nc(row + c));
      squares += x * x;
    }
    return square_root(lanes_sum<32>(squares));
  }
};

}  // namespace lagkv::cuda
