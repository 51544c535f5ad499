// The kernels of one instruction set as function pointers on tiles of rows. No vectors: their callers are
// compiled once, for the baseline machine.
#pragma once

#include <cstdint>

#include "../params.h"
#include "types.h"

namespace lagkv::cpu {

/// Rows to prefetch into the L2 cache, one for each row of a tile; none where `rows` is null.
struct Upcoming {
  const char* rows = nullptr;
  int64_t row_stride = 0;  // bytes
  int64_t row_bytes = 0;
  const char* const* list = nullptr;  // of rows in several pages, kUpcomingPadding longer than the tile
  int64_t list_offset = 0;            // bytes

  /// The first cache lines of every row, and the lines after them, for two passes that share the work.
  Upcoming first(int64_t lines) const {
    return {lines > 0 ? rows : nullptr, row_stride, 64 * lines, list, list_offset};
  }
  Upcoming after(int64_t lines) const {
    return {rows == nullptr ? nullptr : rows + 64 * lines, row_stride, row_bytes - 64 * lines, list,
            list_offset + 64 * lines};
  }
};

constexpr int64_t kUpcomingPadding = 64;  // rows: kernels prefetch several at once

/// A partition: `count` rows of `dim` contiguous elements, `row_stride` elements apart.
template <class T>
struct Tile {
  const T* rows;
  int64_t row_stride;
  int64_t count;
  int64_t dim;
  Upcoming upcoming;
};

/// The kernels of a score: the reference of the next partition, the statistic of each token against it, and
/// the score computed from statistics.
///
/// `reference` is an array of `reference_size(dim)` reals that only these functions read: the bounds for
/// "std", the mean direction for "cosine", both for "blend". `statistic` has room for `statistic_size(count)`
/// reals.
template <class T>
struct ScoreKernels {
  using Real = RealOf<T>;
  void (*reference)(const Tile<T>& tile, Real* reference);
  void (*statistic)(const Tile<T>& tile, const Real* reference, Real* statistic);
  /// In one pass over the tile: its statistic against `reference`, and its own reference `next`.
  void (*advance)(const Tile<T>& tile, const Real* reference, Real* statistic, Real* next);
  /// key_statistic becomes score_K + value_weight * score_V. Both arrays are overwritten.
  void (*score)(Real* key_statistic, Real* value_statistic, int64_t count, double value_weight);
};

template <class T>
struct Kernels {
  using Real = RealOf<T>;
  ScoreKernels<T> std, cosine, blend;
  /// Each score becomes the mean over the `smooth` (odd) tokens around it, as far as there are any. `memory`
  /// has `smoothing_size(count, smooth)` reals.
  void (*smooth)(Real* score, int64_t count, int64_t smooth, Real* memory);
  /// Minimum and maximum of every channel, NaN where a channel holds one; room for `padded(dim)` reals in
  /// each.
  void (*bounds)(const Tile<T>& tile, Real* lo, Real* hi);
  /// Ascending positions, plus `base`, of the `keep` highest scores. `score` (room for `padded(count)`) is
  /// overwritten.
  void (*select)(Real* score, int64_t count, int64_t keep, int32_t base, int32_t* index);
  /// Turns what `select` left in place of the scores into scores again; -0 comes back as +0.
  void (*restore)(Real* score, int64_t count);
  /// A row of storage type to reals, for `select`.
  void (*widen)(const T* row, int64_t count, Real* out);
  /// Copies row index[i] - base of `rows` to row i of `out`; the two may overlap where no destination lies
  /// past its source. `stream`: by streaming stores, if the rows are aligned for them.
  void (*gather)(const T* rows, int64_t row_stride, const int32_t* index, int32_t base, int64_t count,
                 int64_t dim, T* out, int64_t out_stride, bool stream);
  /// Makes streaming stores visible to other threads; called once after the last of them.
  void (*fence)();

  const ScoreKernels<T>& of(Score score) const {
    return score == Score::kStd ? std : score == Score::kCosine ? cosine : blend;
  }
};

/// The kernels of one instruction set.
struct KernelSet {
  Kernels<Half> f16;
  Kernels<BFloat16> bf16;
  Kernels<float> f32;
  Kernels<double> f64;

  template <class T>
  const Kernels<T>& of() const;
};
template <>
inline const Kernels<Half>& KernelSet::of() const {
  return f16;
}
template <>
inline const Kernels<BFloat16>& KernelSet::of() const {
  return bf16;
}
template <>
inline const Kernels<float>& KernelSet::of() const {
  return f32;
}
template <>
inline const Kernels<double>& KernelSet::of() const {
  return f64;
}

constexpr int64_t kPadding = 32;  // reals: two of the widest vectors

constexpr int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// Room for both parts of a blend, one after the other.
constexpr int64_t reference_part(int64_t dim) { return 4 * padded(dim); }
constexpr int64_t reference_size(int64_t dim) { return 2 * reference_part(dim); }
constexpr int64_t statistic_size(int64_t count) { return 2 * padded(count); }

/// Tokens on each side of one over which its score is averaged.
constexpr int64_t smoothing_reach(int64_t count, int64_t smooth) {
  return smooth / 2 < count - 1 ? smooth / 2 : count - 1;
}
/// Scores with zeros before and after them.
constexpr int64_t smoothing_size(int64_t count, int64_t smooth) {
  return smooth == 1 ? 0 : padded(count) + 2 * padded(smoothing_reach(count, smooth)) + kPadding;
}

}  // namespace lagkv::cpu
