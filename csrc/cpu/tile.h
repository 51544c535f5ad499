// What one instruction set offers to the drivers: kernels on tiles of rows. Plain pointers and sizes, no
// vectors, so that the drivers are compiled once for the baseline machine.
#pragma once

#include <cstdint>

#include "types.h"

namespace lagkv::cpu {

/// Rows needed next, to be brought into the L2 cache meanwhile: a row of these for a row of the tile. Null:
/// none.
struct Ahead {
  const char* rows = nullptr;
  int64_t row_stride = 0;  // bytes
  int64_t row_bytes = 0;
  const char* const* list = nullptr;  // of rows in several pages, kAheadPadding longer than the tile
  int64_t list_offset = 0;            // bytes

  /// The first cache lines of every row, and those after them: for two passes that share the fetching.
  Ahead first(int64_t lines) const {
    return {lines > 0 ? rows : nullptr, row_stride, 64 * lines, list, list_offset};
  }
  Ahead after(int64_t lines) const {
    return {rows == nullptr ? nullptr : rows + 64 * lines, row_stride, row_bytes - 64 * lines, list,
            list_offset + 64 * lines};
  }
};

constexpr int64_t kAheadPadding = 64;  // rows: kernels fetch several at once

/// A partition: `count` rows of `dim` contiguous elements, `row_stride` elements apart.
template <class T>
struct Tile {
  const T* rows;
  int64_t row_stride;
  int64_t count;
  int64_t dim;
  Ahead ahead;
};

/// A score: what is kept of the next partition, the statistic of a token against it, and the score made of
/// them.
///
/// `reference` is an array of `reference_size(dim)` reals that only these functions look into: the bounds for
/// "std", the mean direction for "cosine". `statistic` has room for `padded(count)` reals.
template <class T>
struct Method {
  using Real = RealOf<T>;
  void (*reference)(const Tile<T>& tile, Real* reference);
  void (*statistic)(const Tile<T>& tile, const Real* reference, Real* statistic);
  /// Both in one pass over the tile: its statistic against `reference`, and its own `next` reference.
  void (*advance)(const Tile<T>& tile, const Real* reference, Real* statistic, Real* next);
  /// key_statistic becomes score_K + value_weight * score_V. Both arrays are overwritten.
  void (*score)(Real* key_statistic, Real* value_statistic, int64_t count, double value_weight);
};

template <class T>
struct Kernels {
  using Real = RealOf<T>;
  Method<T> std, cosine;
  /// Minimum and maximum of every channel, NaN where a channel holds one; room for `padded(dim)` reals in
  /// each.
  void (*bounds)(const Tile<T>& tile, Real* lo, Real* hi);
  /// Ascending positions, plus `base`, of the `keep` highest scores. `score` (room for `padded(count)`) is
  /// overwritten.
  void (*select)(Real* score, int64_t count, int64_t keep, int32_t base, int32_t* index);
  /// A row of storage type to reals, for `select`.
  void (*widen)(const T* row, int64_t count, Real* out);
  /// out row i = row index[i] - base of `rows`; the two may overlap as long as no out row lies past its
  /// source. `stream`: past the caches, where the rows are aligned for it.
  void (*gather)(const T* rows, int64_t row_stride, const int32_t* index, int32_t base, int64_t count,
                 int64_t dim, T* out, int64_t out_stride, bool stream);
  /// Makes streamed stores visible to other threads; once after the last of them.
  void (*fence)();
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

constexpr int64_t reference_size(int64_t dim) { return 4 * padded(dim); }

}  // namespace lagkv::cpu
