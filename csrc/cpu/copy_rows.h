// Copies between the rows of one head of one sequence, wherever they lie.
#pragma once

#include <algorithm>
#include <cstring>

#include "../rows.h"
#include "kernel_set.h"

namespace lagkv::cpu {

/// The first element of row `position` of tiled pages.
template <class T>
T* tiled_row(const Rows<T>& x, int64_t position) {
  const Tiling& tiling = x.tiling;
  const int64_t row = position % x.block_size;
  return x.data + x.block_table[position / x.block_size] * x.block_stride + row / tiling.span * x.row_stride +
         row % tiling.span * tiling.span_stride;
}

/// Copies row `position` of tiled pages to `out`.
template <class T>
void read_tiled(const Rows<const T>& x, int64_t position, T* out) {
  const T* from = tiled_row(x, position);
  for (int64_t c = 0; c < x.dim; from += x.tiling.group_stride) {
    for (int64_t e = 0; e < x.tiling.group; ++e, ++c) out[c] = from[e * x.tiling.element_stride];
  }
}

/// Copies `row` to row `position` of tiled pages.
template <class T>
void write_tiled(const T* row, const Rows<T>& out, int64_t position) {
  T* to = tiled_row(out, position);
  for (int64_t c = 0; c < out.dim; to += out.tiling.group_stride) {
    for (int64_t e = 0; e < out.tiling.group; ++e, ++c) to[e * out.tiling.element_stride] = row[c];
  }
}

/// Copies a row between pages of one tiling.
template <class T>
void copy_tiled(const Rows<const T>& x, int64_t position, const Rows<T>& out, int64_t position_out) {
  const T* from = tiled_row(x, position);
  T* to = tiled_row(out, position_out);
  const Tiling& tiling = out.tiling;
  for (int64_t c = 0; c < out.dim;
       c += tiling.group, from += tiling.group_stride, to += tiling.group_stride) {
    for (int64_t e = 0; e < tiling.group; ++e)
      to[e * tiling.element_stride] = from[e * tiling.element_stride];
  }
}

/// Copies the rows at `index` (ascending positions) to the rows first_out .. first_out+count-1 of `out`.
/// `rows` is row `base`, the others follow `row_stride` apart. Source and destination may be the same memory
/// where no row moves to a higher position.
template <class T>
void gather_rows(const Kernels<T>& kernels, const T* rows, int64_t row_stride, int64_t base,
                 const Rows<T>& out, const int32_t* index, int64_t first_out, int64_t count, bool stream) {
  if (out.is_tiled()) {
    for (int64_t i = 0; i < count; ++i)
      write_tiled(rows + (index[i] - base) * row_stride, out, first_out + i);
    return;
  }
  while (count > 0) {
    const int64_t now = out.together(first_out, count);
    kernels.gather(rows, row_stride, index, static_cast<int32_t>(base), now, out.dim, out.row(first_out),
                   out.row_stride, stream);
    index += now, first_out += now, count -= now;
  }
}

/// The same, from the rows of x.
template <class T>
void gather_rows(const Kernels<T>& kernels, const Rows<const T>& x, const Rows<T>& out, const int32_t* index,
                 int64_t first_out, int64_t count, bool stream) {
  while (count > 0) {
    const int64_t base = *index, end = base + x.together(base, index[count - 1] - base + 1);
    const int64_t now = index[count - 1] < end ? count : std::lower_bound(index, index + count, end) - index;
    gather_rows(kernels, x.row(base), x.row_stride, base, out, index, first_out, now, stream);
    index += now, first_out += now, count -= now;
  }
}

/// Copies `count` rows of x from `first` on to the rows of `out` from first_out on, under the same condition.
template <class T>
void copy_rows(const Rows<const T>& x, const Rows<T>& out, int64_t first, int64_t first_out, int64_t count) {
  const auto bytes = static_cast<size_t>(x.dim) * sizeof(T);
  if (x.is_tiled()) {
    for (int64_t i = 0; i < count; ++i) {
      if (out.is_tiled()) {
        copy_tiled(x, first + i, out, first_out + i);
      } else {
        read_tiled(x, first + i, out.row(first_out + i));
      }
    }
    return;
  }
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
