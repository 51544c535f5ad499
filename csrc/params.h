// Parameters of the kernels of every backend: sizes, strides and pointers with their shapes. No torch, no
// CUDA runtime.
#pragma once

#include <type_traits>

#include "rows.h"

namespace lagkv {

enum class Score : int32_t { kStd = 0, kCosine = 1, kBlend = 2 };

/// Where the places for kept rows are counted: `keep` in each partition, or `keep` times the partitions for
/// all rows of a head that have a score.
enum class Budget : int32_t { kPartition = 0, kHead = 1 };

/// How tokens are scored, and among which of them those kept are chosen.
struct Method {
  double value_weight = 1;
  Score score = Score::kStd;
  int64_t smooth = 1;  // odd: tokens of a partition around each one that its score is the mean of
  Budget budget = Budget::kPartition;
};

/// The type of scores of rows of T: double for double, float for all else.
template <class T>
using ScoreOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Scores of the rows sink .. start-1 that earlier compressions kept, and of those that this one keeps, for
/// Budget::kHead. `in` and `out` may be the same memory.
template <class T>
struct Carried {
  bool exists = false;             // otherwise rows before start do not compete, and nobody wants scores
  int64_t sink = 0;                // the first row that has a score
  int64_t first = 0;               // the row whose score is number 0 of `in` and `out`: 0 or sink
  Rows<const ScoreOf<T>> in = {};  // dim 1
  Rows<ScoreOf<T>> out = {};
};

/// Number of partitions P of a sequence of `length` tokens (docs/method.md, section 1). 0 where length <
/// start.
LAGKV_HOST_DEVICE int64_t partition_count(int64_t length, int64_t start, int64_t lag_size) {
  return length > start ? (length - start) / lag_size : 0;
}

/// Number of partitions that are compressed: all but the last one, which is only looked at.
LAGKV_HOST_DEVICE int64_t compressed_count(int64_t length, int64_t start, int64_t lag_size) {
  const int64_t count = partition_count(length, start, lag_size);
  return count > 1 ? count - 1 : 0;
}

/// N' = N - (P - 1) (L - k), and N where P < 2. The one formula; Python's is `lagkv_ext.output_length`.
LAGKV_HOST_DEVICE int64_t output_length(int64_t length, int64_t start, int64_t lag_size, int64_t keep) {
  return length - compressed_count(length, start, lag_size) * (lag_size - keep);
}

/// The arguments of `compress` and, with key_out = key and value_out = value, of `compress_`.
template <class T>
struct CompressParams {
  Rows<const T> key;             // [B, H, N, Dk]
  Rows<const T> value;           // [B, H, N, Dv]
  Rows<T> key_out;               // [B, H, N', Dk]
  Rows<T> value_out;             // [B, H, N', Dv]
  int32_t* index;                // [B, H, N'] contiguous: input position of every output row, ascending
  int64_t batch, heads, length;  // B, H, N
  int64_t start, lag_size, keep;
  Method method;
  Carried<T> carried;
};

/// `partition_bounds`: per channel minimum and maximum of every full partition.
template <class T, class Real>
struct BoundsParams {
  Rows<const T> x;  // [B, H, N, D]
  Real* bounds;     // [B, H, P, 2, D] contiguous: lo, hi
  int64_t batch, heads, length;
  int64_t start, lag_size;
};

/// `lag_score`: the score of every token of partitions 0 .. P-2.
template <class T, class Real>
struct ScoreParams {
  Rows<const T> key;    // [B, H, N, Dk]
  Rows<const T> value;  // [B, H, N, Dv]
  Real* score;          // [B, H, P-1, L] contiguous
  int64_t batch, heads, length;
  int64_t start, lag_size;
  Method method;  // its budget has no meaning here
};

constexpr int kScoreDims = 4;

/// Starts of rows of scores: leading dimensions, outermost first, in elements.
struct ScoreRows {
  int64_t size[kScoreDims], stride[kScoreDims];

  LAGKV_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (int dim = kScoreDims - 1; dim > 0; --dim) {
      offset += row % size[dim] * stride[dim];
      row /= size[dim];
    }
    return offset + row * stride[0];
  }
};

/// Merges leading dimensions of a score tensor where their strides allow; false where more than kScoreDims
/// are left.
inline bool merge_rows(const int64_t* sizes, const int64_t* strides, int64_t dims, ScoreRows& rows) {
  int count = 0;
  ScoreRows merged{};
  for (int64_t dim = 0; dim < dims; ++dim) {
    if (sizes[dim] == 1) continue;
    if (count > 0 && merged.stride[count - 1] == strides[dim] * sizes[dim]) {
      merged.size[count - 1] *= sizes[dim];
      merged.stride[count - 1] = strides[dim];
      continue;
    }
    if (count == kScoreDims) return false;
    merged.size[count] = sizes[dim];
    merged.stride[count++] = strides[dim];
  }
  for (int dim = 0; dim < kScoreDims; ++dim) {
    const int from = dim - (kScoreDims - count);
    rows.size[dim] = from < 0 ? 1 : merged.size[from];
    rows.stride[dim] = from < 0 ? 0 : merged.stride[from];
  }
  return true;
}

/// `topk_index`: positions of the `keep` highest scores of every row, ascending.
template <class T>
struct TopkParams {
  const T* score;    // [rows, L], contiguous in L
  ScoreRows places;  // of the rows
  int32_t* index;    // [rows, keep] contiguous
  int64_t rows, lag_size, keep;
};

/// `compact`: rows of x gathered by index.
template <class T>
struct CompactParams {
  Rows<const T> x;                      // [B, H, N, D]
  Rows<T> out;                          // [B, H, K, D]
  Rows<const int32_t> index;            // [B, H, K]: dim = 1, row_stride = stride of the last dimension
  int64_t batch, heads, length, count;  // B, H, N, K
};

}  // namespace lagkv
