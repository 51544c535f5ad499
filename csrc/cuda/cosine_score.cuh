// The cosine statistic (docs/method.md 2): direction u_t = x_t / |x_t| (0 where |x_t| = 0), anchor of the
// next partition a = mean_t u_t, s = -cos(x, a) = -(u . a / |a|). The same rows add to the anchor of their
// own partition.
#pragma once

#include "rows.cuh"

namespace lagkv::cuda {

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

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

template <class Layout>
struct CosineTerms {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  static constexpr int kPartials = 1;
  using Partial = Real;

  Real anchor[Layout::kChannels], total[Layout::kChannels];

  __device__ __forceinline__ explicit CosineTerms(Real /*share*/) {
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) anchor[c] = total[c] = Real(0);
  }

  /// `reference` holds the anchor as it was summed; here it gets its norm of 1.
  __device__ __forceinline__ void load(const Store<Real>& reference, int dim,
                                       const typename Layout::Seat& seat) {
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

  /// s, known to every lane of the row. A missing row is all zeros, has no direction and adds nothing.
  __device__ __forceinline__ Real visit(const typename Layout::Values& x, int /*dim*/, bool /*exists*/,
                                        bool /*scored*/, const typename Layout::Seat& /*seat*/) {
    Real row[Layout::kChannels];
    Layout::unpack_row(x, row);
    Real squares = 0;
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) squares += row[c] * row[c];
    const Norm<Real> norm(lanes_sum<Layout::kLanes>(squares));
    Real cosine = 0;
#pragma unroll
    for (int c = 0; c < Layout::kChannels; ++c) {
      const Real direction = norm.divide(row[c]);
      cosine += direction * anchor[c];
      total[c] += direction;
    }
    return -lanes_sum<Layout::kLanes>(cosine);
  }

  // Sums in two levels: a lane's own of this many rounds, and their sum in `partial`. The error of a sum of
  // 65,536 directions one by one would show in the scores.
  static constexpr unsigned kShareRounds = 32;

  /// Adds this warp's directions to its sums in shared memory, [D] of `partial`, or starts them, and clears
  /// its own.
  __device__ __forceinline__ void share(Real* partial, int dim, bool first,
                                        const typename Layout::Seat& seat) {
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

  static __device__ __forceinline__ void gather(const Real* partial, int dim, int channel,
                                                const Store<Real>& reference, int64_t rows) {
    Real sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += ld_shared(partial + warp * dim + channel);
    reference.set(channel, sum / static_cast<Real>(rows));
  }
};

}  // namespace lagkv::cuda
