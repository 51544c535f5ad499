// Tensors that passed the checks as RaggedParams: the same for every backend. `Tensor` is a template
// parameter (size, sizes, strides, data_ptr), as the executor of tests/simt has tensors without torch's
// headers.
#pragma once

#include "ragged.h"

namespace lagkv {

template <class Tensor>
const int32_t* numbers(const Tensor& x) {
  return static_cast<const int32_t*>(x.data_ptr());
}
template <class Tensor>
int32_t* written_numbers(const Tensor& x) {
  return static_cast<int32_t*>(x.data_ptr());
}

/// Parameters that the three operators share; their rows, numbers and index follow below.
template <class T>
RaggedParams<T> ragged_params(int64_t batch, int64_t heads, int64_t capacity, int64_t lag_size, int64_t keep,
                              const Method& method) {
  RaggedParams<T> params{};
  params.batch = batch;
  params.heads = heads;
  params.capacity = capacity;
  params.lag_size = lag_size;
  params.keep = keep;
  params.method = method;
  return params;
}

template <class T, class Tensor>
void set_in_place(RaggedParams<T>& params, const Tensor& start, const Tensor& length, const Tensor& index) {
  params.start = params.new_start = written_numbers(start);
  params.length = params.new_length = written_numbers(length);
  params.index = written_numbers(index);
}

template <class T, class Tensor>
RaggedParams<T> slot_params(const Tensor& key, const Tensor& value, const Tensor& start, const Tensor& length,
                            const Tensor& index, int64_t lag_size, int64_t keep, const Method& method) {
  auto params = ragged_params<T>(key.size(0), key.size(1), key.size(2), lag_size, keep, method);
  params.key = slot_rows<const T>(key);
  params.value = slot_rows<const T>(value);
  params.key_out = slot_rows<T>(key);
  params.value_out = slot_rows<T>(value);
  set_in_place(params, start, length, index);
  return params;
}

template <class T, class Tensor>
RaggedParams<T> packed_params(const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
                              const Tensor& start, const Tensor& new_key, const Tensor& new_value,
                              const Tensor& index, const Tensor& new_cu_seqlens, const Tensor& new_start,
                              int64_t lag_size, int64_t keep, const Method& method) {
  auto params = ragged_params<T>(start.size(0), key.size(1), key.size(0), lag_size, keep, method);
  params.key = packed_rows<const T>(key, cu_seqlens);
  params.value = packed_rows<const T>(value, cu_seqlens);
  params.key_out = packed_rows<T>(new_key, new_cu_seqlens);
  params.value_out = packed_rows<T>(new_value, new_cu_seqlens);
  params.start = numbers(start);
  params.new_start = written_numbers(new_start);
  params.new_offsets = written_numbers(new_cu_seqlens);
  params.index = written_numbers(index);
  return params;
}

template <class T, class Tensor>
RaggedParams<T> page_params(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                            const Tensor& start, const Tensor& length, const Tensor& index, int64_t lag_size,
                            int64_t keep, const Method& method) {
  auto params = ragged_params<T>(block_table.size(0), key_cache.size(2),
                                 block_table.size(1) * key_cache.size(1), lag_size, keep, method);
  params.key = page_rows<const T>(key_cache, block_table);
  params.value = page_rows<const T>(value_cache, block_table);
  params.key_out = page_rows<T>(key_cache, block_table);
  params.value_out = page_rows<T>(value_cache, block_table);
  params.blocks = key_cache.size(0);
  set_in_place(params, start, length, index);
  return params;
}

/// Scores that go with the rows, read and written where they lie: [B, H, capacity] of slots and dense rows.
template <class T, class Tensor>
Carried<T> slot_scores(const Tensor& scores, int64_t sink) {
  using Real = ScoreOf<T>;
  return {true, sink, 0, number_rows<const Real>(scores), number_rows<Real>(scores)};
}

/// The same for pages: [blocks, block_size, H].
template <class T, class Tensor>
Carried<T> page_scores(const Tensor& scores, const Tensor& block_table, int64_t sink) {
  using Real = ScoreOf<T>;
  return {true, sink, 0, page_numbers<const Real>(scores, block_table),
          page_numbers<Real>(scores, block_table)};
}

}  // namespace lagkv
