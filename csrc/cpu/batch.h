// A batch to compress, dense or ragged, as every driver takes it.
#pragma once

#include <algorithm>
#include <vector>

#include "ragged.h"

namespace lagkv::cpu {

/// Rows that are copied unchanged: `count` rows from `first` on go to the rows from `first_out` on.
struct Copied {
  int64_t first, first_out, count;
};

struct Sequence {
  int64_t first, first_out;  // row of the first compressed partition, and output row of its first kept one
  int64_t sink;              // the first row that competes: `first`, unless rows before it have scores
  int64_t partitions;    // that are compressed; 0 where every row is kept and nobody wants to know its score
  Copied before, after;  // rows before the sink's end and after these partitions
  int32_t* index;        // of its first head
  int64_t index_size;    // entries of a head that belong to this sequence; -1 past its new length

  int64_t new_length() const { return partitions > 0 ? after.first_out + after.count : before.count; }
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
};

/// All of a sequence whose first partition begins at row `start`.
template <class T>
Sequence whole_sequence(int64_t start, int64_t length, int64_t compressed, int64_t lag_size, int64_t keep,
                        const Carried<T>& carried, int32_t* index, int64_t index_size) {
  const int64_t sink = carried.exists ? std::min(carried.sink, start) : start;
  if (compressed == 0 || (keep == lag_size && !carried.exists)) {
    return {start, start, sink, 0, {0, 0, length}, {0, 0, 0}, index, index_size};
  }
  const int64_t window = start + compressed * lag_size, window_out = start + compressed * keep;
  return {start, start,     sink, compressed, {0, 0, sink}, {window, window_out, length - window},
          index, index_size};
}

template <class T>
Batch<T> dense_batch(const CompressParams<T>& p) {
  const int64_t rows = output_length(p.length, p.start, p.lag_size, p.keep);
  const int64_t compressed = compressed_count(p.length, p.start, p.lag_size);
  const Sequence one =
      whole_sequence(p.start, p.length, compressed, p.lag_size, p.keep, p.carried, nullptr, rows);
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
    batch.sequences.push_back(whole_sequence(from.start, from.length, from.compressed, p.lag_size, p.keep,
                                             p.carried, p.index_of(b, 0), size));
  }
  return batch;
}

}  // namespace lagkv::cpu
