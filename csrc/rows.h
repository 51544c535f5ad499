// The one address map: where row `position` of head `head` of sequence `sequence` lies, in dense tensors and
// slots, in packed rows and in pages. Every backend and every operator finds its rows here. No torch, no CUDA
// runtime.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__)
#define LAGKV_HOST_DEVICE __host__ __device__ __forceinline__
// Before a function of host and device that takes a Load, which may be for the device alone.
#define LAGKV_ANY_LOAD _Pragma("nv_exec_check_disable")
#else
#define LAGKV_HOST_DEVICE inline
#define LAGKV_ANY_LOAD
#endif

namespace lagkv {

/// Reads a number of `offsets` or `block_table`; device code brings its own.
struct PlainLoad {
  LAGKV_HOST_DEVICE int32_t operator()(const int32_t* number) const { return *number; }
};

/// Where the elements of pages lie whose rows are not contiguous, as some engines have them on a CPU: row r
/// of a page begins at r / span row_stride + r % span span_stride, its channel c lies c / group group_stride
/// + c % group element_stride behind that. span = 0: rows are contiguous.
struct Tiling {
  int64_t span = 0, span_stride = 0;
  int64_t group = 0, group_stride = 0, element_stride = 0;
};

/// Strides and sizes are in elements; a row of `dim` elements is contiguous, but for pages with a tiling,
/// which only copies on the CPU know (cpu/copy_rows.h).
///
///   slots   sequence b begins at b block_stride (dense tensors too)    offsets null, block_size 0
///   packed  sequence b begins at row offsets[b]                        offsets = cu_seqlens [B + 1]
///   pages   row i of sequence b is row i % block_size of block         block_table [B, max_blocks],
///   block_size > 0
///           block_table[b, i / block_size]
///
/// `head` gives the rows of one head of one sequence as Rows of their own, in which a position alone is a
/// place.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t block_stride = 0;  // of a slot or of a page
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t dim = 0;
  const int32_t* offsets = nullptr;
  const int32_t* block_table = nullptr;  // contiguous in its last dimension
  int64_t table_stride = 0;
  int64_t block_size = 0;
  Tiling tiling = {};

  bool is_tiled() const { return tiling.span > 0; }
  LAGKV_HOST_DEVICE bool is_packed() const { return offsets != nullptr; }
  LAGKV_HOST_DEVICE bool is_paged() const { return block_size > 0; }

  LAGKV_ANY_LOAD template <class Load = PlainLoad>
  LAGKV_HOST_DEVICE Rows head(int64_t sequence, int64_t head, const Load& load = {}) const {
    Rows one = *this;
    one.data += head * head_stride;
    one.offsets = nullptr;
    if (is_packed()) {
      one.data += load(offsets + sequence) * row_stride;
    } else if (is_paged()) {
      one.block_table += sequence * table_stride;
    } else {
      one.data += sequence * block_stride;
    }
    return one;
  }

  /// As `head` for rows known to be slots: a dense kernel pays for no other map.
  LAGKV_HOST_DEVICE Rows slot(int64_t sequence, int64_t head) const {
    return {
        data + sequence * block_stride + head * head_stride, 0, 0, row_stride, dim, nullptr, nullptr, 0, 0};
  }

  /// Row `position` of the one head that these rows are.
  LAGKV_ANY_LOAD template <class Load = PlainLoad>
  LAGKV_HOST_DEVICE T* row(int64_t position, const Load& load = {}) const {
    if (!is_paged()) return data + position * row_stride;
    // Both fit 32 bits, and a device divides these faster.
    const uint32_t page = static_cast<uint32_t>(position) / static_cast<uint32_t>(block_size);
    return data + load(block_table + page) * block_stride + (position - page * block_size) * row_stride;
  }

  LAGKV_ANY_LOAD template <class Load = PlainLoad>
  LAGKV_HOST_DEVICE T* row(int64_t sequence, int64_t head, int64_t position, const Load& load = {}) const {
    return this->head(sequence, head, load).row(position, load);
  }

  /// Counts rows, up to `count`, of one head that lie `row_stride` apart from `position` on: to the end of
  /// their page, or further where the next page follows in the pool.
  int64_t together(int64_t position, int64_t count) const {
    if (!is_paged()) return count;
    int64_t rows = block_size - position % block_size;
    if (block_stride == block_size * row_stride) {
      for (const int32_t* block = block_table + position / block_size;
           rows < count && block[1] == block[0] + 1; ++block)
        rows += block_size;
    }
    return std::min(rows, count);
  }

  LAGKV_HOST_DEVICE Rows<const T> readable() const {
    return {data,    block_stride, head_stride,  row_stride, dim,
            offsets, block_table,  table_stride, block_size, tiling};
  }
};

/// Rows of one head that lie `row_stride` apart.
template <class T>
LAGKV_HOST_DEVICE Rows<T> strided_rows(T* data, int64_t row_stride, int64_t dim) {
  return {data, 0, 0, row_stride, dim, nullptr, nullptr, 0, 0};
}

// From tensors to rows. A `Tensor` has sizes(), strides() and data_ptr(): torch's, and that of the executor
// in tests/simt. The stride of a dimension of one element is never used; it must not spoil the alignment of
// the others.

template <class Tensor>
int64_t step_of(const Tensor& x, int dim) {
  return x.sizes()[dim] > 1 ? x.strides()[dim] : 0;
}

/// [B, H, N, D] of a dense operator, [B, H, capacity, D] of slots.
template <class T, class Tensor>
Rows<T> slot_rows(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()),
          step_of(x, 0),
          step_of(x, 1),
          step_of(x, 2),
          x.sizes()[3],
          nullptr,
          nullptr,
          0,
          0};
}

/// [B, H, K], its last dimension of any stride: rows of one element.
template <class T, class Tensor>
Rows<T> number_rows(const Tensor& x) {
  return {
      static_cast<T*>(x.data_ptr()), step_of(x, 0), step_of(x, 1), step_of(x, 2), 1, nullptr, nullptr, 0, 0};
}

/// [T, H, D].
template <class T, class Tensor>
Rows<T> packed_rows(const Tensor& x, const Tensor& cu_seqlens) {
  return {static_cast<T*>(x.data_ptr()),
          0,
          step_of(x, 1),
          step_of(x, 0),
          x.sizes()[2],
          static_cast<const int32_t*>(cu_seqlens.data_ptr()),
          nullptr,
          0,
          0};
}

/// [blocks, block_size, H, D].
template <class T, class Tensor>
Rows<T> page_rows(const Tensor& x, const Tensor& block_table) {
  return {static_cast<T*>(x.data_ptr()),
          step_of(x, 0),
          step_of(x, 2),
          step_of(x, 1),
          x.sizes()[3],
          nullptr,
          static_cast<const int32_t*>(block_table.data_ptr()),
          step_of(block_table, 0),
          x.sizes()[1]};
}

/// [blocks, block_size, H]: rows of one element.
template <class T, class Tensor>
Rows<T> page_numbers(const Tensor& x, const Tensor& block_table) {
  return {static_cast<T*>(x.data_ptr()),
          step_of(x, 0),
          step_of(x, 2),
          step_of(x, 1),
          1,
          nullptr,
          static_cast<const int32_t*>(block_table.data_ptr()),
          step_of(block_table, 0),
          x.sizes()[1]};
}

}  // namespace lagkv
