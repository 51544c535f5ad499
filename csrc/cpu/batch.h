// What there is to compress, for the dense operators and the ragged ones alike: sequences that each have
// their own start and length. A dense batch is one of equal sequences in slots.
#pragma once

#include <vector>

#include "ragged.h"

namespace lagkv::cpu {

struct Sequence {
  int64_t start, length;
  int64_t partitions;  // that lose tokens
  int32_t* index;      // of its first head
  int64_t index_size;  // entries of a head that are this sequence's, -1 past its new length
};

template <class T>
struct Batch {
  Rows<const T> key, value;
  Rows<T> key_out, value_out;  // in place: key and value
  std::vector<Sequence> sequences;
  int64_t heads, index_head_stride;
  int64_t lag_size, keep;
  double value_weight;
  Score score;

  int64_t new_length(const Sequence& sequence) const {
    return sequence.length - sequence.partitions * (lag_size - keep);
  }
  /// Whether every row stays where it is.
  bool all_kept(const Sequence& sequence) const { return sequence.partitions == 0 || keep == lag_size; }
};

template <class T>
Batch<T> dense_batch(const CompressParams<T>& p) {
  const int64_t rows = output_length(p.length, p.start, p.lag_size, p.keep);
  const Sequence one{p.start, p.length, compressed_count(p.length, p.start, p.lag_size), nullptr, rows};
  Batch<T> batch{
      p.key,   p.value, p.key_out,  p.value_out, std::vector<Sequence>(static_cast<size_t>(p.batch), one),
      p.heads, rows,    p.lag_size, p.keep,      p.value_weight,
      p.score};
  for (int64_t b = 0; b < p.batch; ++b) batch.sequences[b].index = p.index + b * p.heads * rows;
  return batch;
}

/// The values must have passed the checks. For compress_varlen, new_offsets must have been written.
template <class T>
Batch<T> ragged_batch(const RaggedParams<T>& p) {
  Batch<T> batch{p.key,      p.value,    p.key_out, p.value_out,    {},     p.heads,
                 p.capacity, p.lag_size, p.keep,    p.value_weight, p.score};
  batch.sequences.reserve(static_cast<size_t>(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    const RaggedSequence from = p.sequence(b);
    int64_t size = p.capacity;
    if (p.is_packed()) size = b + 1 < p.batch ? from.new_length : p.capacity - p.new_offsets[b];
    batch.sequences.push_back({from.start, from.length, from.compressed, p.index_of(b, 0), size});
  }
  return batch;
}

}  // namespace lagkv::cpu
