// A batch to compress, dense or ragged, as every driver takes it.
#pragma once

#include <algorithm>
#include <vector>

#include "ragged.h"

namespace lagkv::cpu {

struct Sequence {
  int64_t start, length;
  int64_t sink;        // rows before it are kept; start, unless rows before start have scores
  int64_t partitions;  // compressed ones, P - 1
  int32_t* index;      // of its first head
  int64_t index_size;  // entries of a head that belong to this sequence; -1 past its new length
};

template <class T>
struct Batch {
  Rows<const T> key, value;
  Rows<T> key_out, value_out;  // in place: key and value
  std::vector<Sequence> sequences;
  int64_t heads, index_head_stride;
  int64_t lag_size, keep;
  Method method;
  Carried<T> carried;

  int64_t new_length(const Sequence& sequence) const {
    return sequence.length - sequence.partitions * (lag_size - keep);
  }
  /// True where no row is dropped, and nobody wants to know its score.
  bool all_kept(const Sequence& sequence) const {
    return sequence.partitions == 0 || (keep == lag_size && !carried.exists);
  }
};

/// The first row of a sequence that competes with others.
template <class T>
int64_t sink_of(const Carried<T>& carried, int64_t start) {
  return carried.exists ? std::min(carried.sink, start) : start;
}

template <class T>
Batch<T> dense_batch(const CompressParams<T>& p) {
  const int64_t rows = output_length(p.length, p.start, p.lag_size, p.keep);
  const Sequence one{
      p.start, p.length, sink_of(p.carried, p.start), compressed_count(p.length, p.start, p.lag_size),
      nullptr, rows};
  Batch<T> batch{
      p.key,    p.value, p.key_out,  p.value_out, std::vector<Sequence>(static_cast<size_t>(p.batch), one),
      p.heads,  rows,    p.lag_size, p.keep,      p.method,
      p.carried};
  for (int64_t b = 0; b < p.batch; ++b) batch.sequences[b].index = p.index + b * p.heads * rows;
  return batch;
}

/// Start and length of every sequence must have been checked. compress_varlen must have written new_offsets.
template <class T>
Batch<T> ragged_batch(const RaggedParams<T>& p) {
  Batch<T> batch{p.key,      p.value,    p.key_out, p.value_out, {},       p.heads,
                 p.capacity, p.lag_size, p.keep,    p.method,    p.carried};
  batch.sequences.reserve(static_cast<size_t>(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    const RaggedSequence from = p.sequence(b);
    int64_t size = p.capacity;
    if (p.is_packed()) size = b + 1 < p.batch ? from.new_length : p.capacity - p.new_offsets[b];
    batch.sequences.push_back(
        {from.start, from.length, sink_of(p.carried, from.start), from.compressed, p.index_of(b, 0), size});
  }
  return batch;
}

}  // namespace lagkv::cpu
