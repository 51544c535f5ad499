// Packed rows to a new tensor by an index that is complete: the last step of compress_varlen where rows are
// not selected as they are scored. Rows are moved as machine words W, as compact.cuh moves them.
#pragma once

#include "schedule.cuh"

namespace lagkv::cuda {

template <class W>
struct GatherLaunch {
  Rows<const W> x;               // [T, H, D], offsets: cu_seqlens
  Rows<W> out;                   // [T, H, D], offsets: the new cu_seqlens
  const int32_t* index;          // [H, T]: position in its sequence; -1 behind all sequences
  int64_t batch, heads, length;  // B, H, T
  CompactPlan plan;
};

/// The sequence that has row `row`: the last one that begins at or before it. By one thread.
__device__ __forceinline__ int64_t sequence_of(const int32_t* offsets, int64_t batch, int64_t row) {
  int64_t first = 0, last = batch - 1;
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (ld_global_nc(offsets + middle) <= row) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

/// out[r, h] = x[cu_seqlens[b] + index[h, r], h] of the sequence b that has row r of the output. Traffic:
/// gathered rows and index read, output written; per row log2(B) numbers, mostly from cache.
template <class W>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherLaunch<W> launch) {
  LAGKV_SHARED(int64_t, from, kCopyRows);  // row of x; -1: none
  const int64_t head = block_of_grid() / launch.plan.tiles;
  const int64_t first = block_of_grid() % launch.plan.tiles * kCopyRows;
  const int rows = static_cast<int>(launch.length - first < kCopyRows ? launch.length - first : kCopyRows);
  for (int j = thread_of_block(); j < rows; j += kThreads) {
    const int64_t position = ld_global_nc(launch.index + head * launch.length + first + j);
    int64_t row = -1;
    if (position >= 0) {
      const int64_t b = sequence_of(launch.out.offsets, launch.batch, first + j);
      row = ld_global_nc(launch.x.offsets + b) + position;
    }
    st_shared(from + j, row);
  }
  __syncthreads();
  const W* const x = launch.x.data + head * launch.x.head_stride;
  W* const out = launch.out.data + head * launch.out.head_stride + first * launch.out.row_stride;
  for (int64_t left = 0; left < launch.x.dim; left += kThreads) {
    const ColumnSeat seat(static_cast<int>(launch.x.dim - left < kThreads ? launch.x.dim - left : kThreads));
    const int64_t column = left + seat.column;
    for (int j = seat.row; seat.works && j < rows; j += seat.rows_per_pass) {
      const int64_t row = ld_shared(from + j);
      if (row >= 0) {
        st_global(out + j * launch.out.row_stride + column,
                  ld_global_nc_stream(x + row * launch.x.row_stride + column));
      }
    }
  }
}

}  // namespace lagkv::cuda
