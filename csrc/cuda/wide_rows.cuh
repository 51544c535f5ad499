// Rows of any length (WideRow): a warp takes a row and reads it once per sum, a thread takes a channel of
// the reference and walks the rows of the partition. Slower than the streaming layouts (about three reads,
// most of them from cache), and always right: odd D, D beyond what lanes can hold, D = 0.
#pragma once

#include "cosine_score.cuh"
#include "std_score.cuh"

namespace lagkv::cuda {

/// Calls visit(c, x_c) for the channels of a row that belong to this lane.
template <class T, class Visit>
__device__ __forceinline__ void for_channels(const T* row, int64_t dim, const Visit& visit) {
  for (int64_t c = Place().lane; c < dim; c += 32) visit(c, to_real(ld_global_nc(row + c)));
}

/// |x|; every lane gets it.
template <class T, class Real>
__device__ __forceinline__ Real norm_of(const T* row, int64_t dim) {
  Real squares = 0;
  for_channels(row, dim, [&](int64_t, Real x) { squares += x * x; });
  return square_root(lanes_sum<32>(squares));
}

template <class Real>
__device__ __forceinline__ Real divide_or_zero(Real x, Real divisor) {
  return divisor == Real(0) ? Real(0) : x / divisor;
}

/// Bounds of one channel of a partition's rows, by one thread.
template <class T, class AnyTile>
__device__ __forceinline__ Range<T> column_range(const AnyTile& tile, int64_t channel) {
  const T first = ld_global_nc(tile.row(0) + channel);
  Range<T> range{first, first};
  for (int t = 1; t < tile.count; ++t) {
    const T x = ld_global_nc(tile.row(t) + channel);
    range = {min_nan(range.lo, x), max_nan(range.hi, x)};
  }
  return range;
}

template <Score kScore, class T, class Real>
__device__ __forceinline__ Real wide_statistic(const T* row, int64_t dim, const Store<Real>& reference) {
  if constexpr (kScore == Score::kStd) {
    const Bounds<Real> bounds(reference, dim);
    Real sum = 0, squares = 0;
    for_channels(row, dim, [&](int64_t c, Real x) { sum += (x - bounds.lo.get(c)) * bounds.scale.get(c); });
    const Real mean = lanes_sum<32>(sum) / static_cast<Real>(dim);
    for_channels(row, dim, [&](int64_t c, Real x) {
      const Real off = (x - bounds.lo.get(c)) * bounds.scale.get(c) - mean;
      squares += off * off;
    });
    return lanes_sum<32>(squares);
  } else {
    const Real norm = norm_of<T, Real>(row, dim);
    Real cosine = 0;
    for_channels(row, dim, [&](int64_t c, Real x) { cosine += divide_or_zero(x, norm) * reference.get(c); });
    return -lanes_sum<32>(cosine);
  }
}

/// The reference that the rows of this partition make for the partition before. `norms` [rows] holds |x| of
/// its rows (cosine); `slots` [2 * kWarps] shared. Ends without a barrier.
template <Score kScore, class T, class AnyTile, class Real>
__device__ __forceinline__ void wide_reference(const AnyTile& tile, const Store<Real>& reference,
                                               const Store<Real>& norms, Real* slots) {
  const int64_t dim = tile.dim;
  const int count = tile.count;
  if constexpr (kScore == Score::kStd) {
    for (int64_t c = thread_of_block(); c < dim; c += kThreads) {
      const Range<T> range = column_range<T>(tile, c);
      Bounds<Real>(reference, dim).set(c, to_real(range.lo), to_real(range.hi));
    }
  } else {
    const Place place;
    for (int t = place.warp; t < count; t += kWarps) {
      const Real norm = norm_of<T, Real>(tile.row(t), dim);
      if (place.lane == 0) norms.set(t, norm);
    }
    __syncthreads();
    Two<Real> squares{0, 0};
    for (int64_t c = thread_of_block(); c < dim; c += kThreads) {
      Real sum = 0;
      constexpr int kPanel = 256;  // in two levels: the error of one long sum would show in the scores
      for (int panel = 0; panel < count; panel += kPanel) {
        Real part = 0;
        for (int t = panel; t < count && t < panel + kPanel; ++t) {
          part += divide_or_zero(to_real(ld_global_nc(tile.row(t) + c)), norms.get(t));
        }
        sum += part;
      }
      sum /= static_cast<Real>(count);
      reference.set(c, sum);
      squares.key += sum * sum;
    }
    const Real norm = square_root(block_two<false>(squares, slots).key);
    for (int64_t c = thread_of_block(); c < dim; c += kThreads)
      reference.set(c, divide_or_zero(reference.get(c), norm));
  }
}

}  // namespace lagkv::cuda
