// Parameters of the kernels of the ragged operators: sequences that each have their own start and length, in
// slots, packed rows or pages (rows.h). No torch, no CUDA runtime.
#pragma once

#include "params.h"

namespace lagkv {

/// One sequence as its start and length say. A sequence whose values cannot be is left as it is: the CPU has
/// refused it before, a device finds out in its kernels.
struct RaggedSequence {
  bool valid;             // 0 <= start and 0 <= length <= capacity
  int64_t start, length;  // both 0 where not valid
  int64_t compressed;     // partitions that lose tokens, P - 1
  int64_t new_start, new_length;
};

LAGKV_HOST_DEVICE RaggedSequence ragged_sequence(int64_t start, int64_t length, int64_t capacity,
                                                 int64_t lag_size, int64_t keep) {
  if (start < 0 || length < 0 || length > capacity) return {false, 0, 0, 0, 0, 0};
  const int64_t compressed = compressed_count(length, start, lag_size);
  return {
      true, start, length, compressed, start + compressed * keep, length - compressed * (lag_size - keep)};
}

/// The arguments of compress_ragged_, compress_varlen and compress_paged_. In place, *_out are the inputs.
///
/// compress_varlen has no length: it is offsets[b + 1] - offsets[b], and the new lengths make
/// key_out.offsets = value_out.offsets, which the kernels write first (as new_offsets).
template <class T>
struct RaggedParams {
  Rows<const T> key;    // slots [B, H, capacity, Dk]; rows [T, H, Dk]; pages [blocks, block_size, H, Dk]
  Rows<const T> value;  // as key, with Dv
  Rows<T> key_out, value_out;
  const int32_t* start;   // [B]
  const int32_t* length;  // [B]; varlen: null
  int32_t* new_start;     // [B], in place: start
  int32_t* new_length;    // [B], in place: length; varlen: null
  int32_t* new_offsets;   // [B + 1]; varlen alone
  /// Position in its sequence of every row that stayed, ascending; -1 past the new length (varlen: past the
  /// new rows of all sequences). slots and pages [B, H, capacity]; varlen [H, T] = [H, capacity], from
  /// new_offsets[b] on. Contiguous.
  int32_t* index;
  int64_t batch, heads, capacity;  // B, H, rows that a sequence can have (varlen: T)
  int64_t blocks;                  // pages in the pool; block_table must stay in 0 .. blocks - 1
  int64_t lag_size, keep;
  Method method;
  Carried<T> carried;  // slots and pages alone

  LAGKV_HOST_DEVICE bool is_packed() const { return key.is_packed(); }

  LAGKV_ANY_LOAD template <class Load = PlainLoad>
  LAGKV_HOST_DEVICE RaggedSequence sequence(int64_t b, const Load& load = {}) const {
    int64_t tokens;
    if (is_packed()) {
      const int64_t first = load(key.offsets + b), last = load(key.offsets + b + 1);
      tokens = first >= 0 && last <= capacity ? last - first : -1;
    } else {
      tokens = load(length + b);
    }
    return ragged_sequence(load(start + b), tokens, capacity, lag_size, keep);
  }

  /// Returns where the index of a sequence's head begins.
  LAGKV_ANY_LOAD template <class Load = PlainLoad>
  LAGKV_HOST_DEVICE int32_t* index_of(int64_t b, int64_t head, const Load& load = {}) const {
    return is_packed() ? index + head * capacity + load(new_offsets + b)
                       : index + (b * heads + head) * capacity;
  }
};

}  // namespace lagkv
