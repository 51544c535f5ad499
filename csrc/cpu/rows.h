// The rows of one head of one sequence, wherever they lie, and copies between them.
#pragma once

#include <algorithm>
#include <cstring>

#include "ragged.h"
#include "tile.h"

namespace lagkv::cpu {

/// Rows `row_stride` apart, or in pages: then `data` is row 0 of block 0, and `blocks` says where the pages
/// are.
template <class T>
struct HeadRows {
  T* data;
  int64_t row_stride, dim;
  const int32_t* blocks;
  int64_t block_size, block_stride;

  HeadRows(const RaggedRows<T>& x, int64_t sequence, int64_t head)
      : data(x.data + head * x.head_stride),
        row_stride(x.row_stride),
        dim(x.dim),
        blocks(x.block_table == nullptr ? nullptr : x.block_table + sequence * x.table_stride),
        block_size(x.block_size),
        block_stride(x.block_stride) {
    if (x.offsets != nullptr) {
      data += x.offsets[sequence] * row_stride;
    } else if (blocks == nullptr) {
      data += sequence * block_stride;
    }
  }

  /// Contiguous rows.
  HeadRows(T* rows, int64_t row_elements)
      : data(rows),
        row_stride(row_elements),
        dim(row_elements),
        blocks(nullptr),
        block_size(0),
        block_stride(0) {}

  T* row(int64_t position) const {
    if (blocks == nullptr) return data + position * row_stride;
    return data + blocks[position / block_size] * block_stride + position % block_size * row_stride;
  }

  /// How many of `count` rows from `position` on lie `row_stride` apart: to the end of their page, or further
  /// where the next page follows in the pool.
  int64_t together(int64_t position, int64_t count) const {
    if (blocks == nullptr) return count;
    int64_t rows = block_size - position % block_size;
    if (block_stride == block_size * row_stride) {
      for (const int32_t* block = blocks + position / block_size; rows < count && block[1] == block[0] + 1;
           ++block)
        rows += block_size;
    }
    return std::min(rows, count);
  }
};

/// Rows first_out .. first_out+count-1 of `out` = those at `index`, which ascends, of rows `row_stride` apart
/// of which the first is at `base`. The two may be the same rows as long as none moves up.
template <class T>
void gather_rows(const Kernels<T>& kernels, const T* rows, int64_t row_stride, int64_t base,
                 const HeadRows<T>& out, const int32_t* index, int64_t first_out, int64_t count,
                 bool stream) {
  while (count > 0) {
    const int64_t now = out.together(first_out, count);
    kernels.gather(rows, row_stride, index, static_cast<int32_t>(base), now, out.dim, out.row(first_out),
                   out.row_stride, stream);
    index += now, first_out += now, count -= now;
  }
}

/// Likewise of the rows of x.
template <class T>
void gather_rows(const Kernels<T>& kernels, const HeadRows<const T>& x, const HeadRows<T>& out,
                 const int32_t* index, int64_t first_out, int64_t count, bool stream) {
  while (count > 0) {
    const int64_t base = *index, end = base + x.together(base, index[count - 1] - base + 1);
    const int64_t now = index[count - 1] < end ? count : std::lower_bound(index, index + count, end) - index;
    gather_rows(kernels, x.row(base), x.row_stride, base, out, index, first_out, now, stream);
    index += now, first_out += now, count -= now;
  }
}

/// `count` rows from `first` on become the rows of `out` from first_out on; likewise.
template <class T>
void copy_rows(const HeadRows<const T>& x, const HeadRows<T>& out, int64_t first, int64_t first_out,
               int64_t count) {
  const auto bytes = static_cast<size_t>(x.dim) * sizeof(T);
  const bool dense = x.row_stride == x.dim && out.row_stride == out.dim;
  while (count > 0) {
    const int64_t rows = out.together(first_out, x.together(first, count));
    const T* from = x.row(first);
    T* to = out.row(first_out);
    if (dense) {
      std::memmove(to, from, bytes * static_cast<size_t>(rows));
    } else {
      for (int64_t i = 0; i < rows; ++i)
        std::memmove(to + i * out.row_stride, from + i * x.row_stride, bytes);
    }
    first += rows, first_out += rows, count -= rows;
  }
}

}  // namespace lagkv::cpu
