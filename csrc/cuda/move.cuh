// The second step of compress_, compress_ragged_ and compress_paged_: rows move down within their head. Rows
// are moved as machine words W of 2 to 16 bytes, whatever they hold: dims, strides and pointers are in units
// of W.
#pragma once

#include "schedule.cuh"

namespace lagkv::cuda {

/// Moves row index[j] to row j for first <= j < last, in a slice of the columns of one head that this block
/// owns. It goes up in passes: all sources of a pass are in registers before any of its rows is written (the
/// barrier), and sources of later passes lie above everything that is written by then, for index[j] >= j and
/// ascending. `columns.at(position)`: where this thread's column of a row is. Traffic: moved rows once in,
/// once out.
template <int kVectors, class Columns>
__device__ __forceinline__ void move_rows(const Columns& columns, int64_t first, int64_t last,
                                          const ColumnSeat& seat, const int32_t* index) {
  typename Columns::Word moved[kVectors];
  for (int64_t pass = first; pass < last; pass += static_cast<int64_t>(seat.rows_per_pass) * kVectors) {
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int64_t j = pass + n * seat.rows_per_pass + seat.row;
      if (seat.works && j < last) moved[n] = ld_global(columns.at(ld_global_nc(index + j)));
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int64_t j = pass + n * seat.rows_per_pass + seat.row;
      if (seat.works && j < last) st_global(columns.at(j), moved[n]);
    }
  }
}

/// Columns and head that a block of a move takes.
struct MoveJob {
  int64_t head;  // of all
  bool is_key;
  int64_t column;

  __device__ __forceinline__ MoveJob(const MoveSlices& slices, int64_t job) {
    const int64_t slice = job % slices.count();
    head = job / slices.count();
    is_key = slice < slices.key_slices;
    column = (is_key ? slice : slice - slices.key_slices) * slices.slice;
  }
  __device__ __forceinline__ int columns(const MoveSlices& slices, int64_t dim) const {
    return static_cast<int>(dim - column < slices.slice ? dim - column : slices.slice);
  }
};

template <class W>
struct MoveLaunch {
  Rows<W> key, value;    // [B, H, N, D]
  const int32_t* index;  // [B, H, N'] ascending, index[j] >= j
  int64_t heads;
  MovePlan plan;
};

/// One column of a dense head.
template <class W>
struct DenseColumn {
  using Word = W;
  W* own;
  const Rows<W>&
      rows;  // the stride is read where it is wanted: in registers it would cost a block per multiprocessor

  __device__ __forceinline__ W* at(int64_t position) const { return own + position * rows.row_stride; }
};

/// x[b, h, j] = x[b, h, index[b, h, j]] for first <= j < rows.
template <class W>
__global__ void __launch_bounds__(kMoveThreads) move_kernel(const MoveLaunch<W> launch) {
  const MovePlan& plan = launch.plan;
  const MoveJob job(plan.slices, blockIdx.x);
  const Rows<W>& x = job.is_key ? launch.key : launch.value;
  const ColumnSeat seat(job.columns(plan.slices, x.dim));
  W* own = x.slot(job.head / launch.heads, job.head % launch.heads).data + job.column + seat.column;
  move_rows<kMoveVectors>(DenseColumn<W>{own, x}, plan.first, plan.rows, seat,
                          launch.index + job.head * plan.rows);
}

template <class W>
struct RaggedMoveLaunch {
  Rows<W> key, value;
  SequenceTable table;
  const int32_t* index;  // [B, H, capacity]
  int64_t heads, capacity, lag_size, keep;
  int64_t sink;    // rows before it stay: no more than start, unless rows before start compete too
  int64_t blocks;  // that fill the device
};

/// One column of a head of a ragged sequence.
template <class W>
struct RaggedColumn {
  using Word = W;
  const Rows<W>& rows;
  int64_t sequence, head, column;

  __device__ __forceinline__ W* at(int64_t position) const {
    return rows.row(sequence, head, position, LoadNc{}) + column;
  }
};

/// Row j of a sequence = row index[j], for min(start, sink) <= j < new length. The sequences that lose tokens
/// are few in most calls: how finely columns are sliced follows their number, on the device. Traffic: moved
/// rows once in, once out; per row its index, and of pages its block table entries.
template <class W>
__global__ void __launch_bounds__(kMoveThreads, 2) ragged_move_kernel(const RaggedMoveLaunch<W> launch) {
  const SequenceTable& table = launch.table;
  const int64_t heads = ld_global_nc(table.first_move(table.batch)) * launch.heads;
  const MoveSlices slices = move_slices(sizeof(W), launch.key.dim, launch.value.dim, heads, launch.blocks);
#pragma unroll 1
  for (int64_t number = blockIdx.x; number < heads * slices.count(); number += gridDim.x) {
    const MoveJob job(slices, number);
    const int64_t head = job.head % launch.heads;
    const int sequence =
        find_sequence<kMoveThreads>(table.first_move(0), table.batch, job.head / launch.heads);
    const int64_t start = ld_global_nc(table.start(sequence));
    const int64_t length = ld_global_nc(table.length(sequence));
    const int64_t compressed = ld_global_nc(table.compressed(sequence));
    const Rows<W>& x = job.is_key ? launch.key : launch.value;
    const ColumnSeat seat(job.columns(slices, x.dim));
    const int64_t first = start < launch.sink ? start : launch.sink;
    move_rows<kRaggedMoveVectors>(RaggedColumn<W>{x, sequence, head, job.column + seat.column}, first,
                                  length - compressed * (launch.lag_size - launch.keep), seat,
                                  launch.index + (sequence * launch.heads + head) * launch.capacity);
  }
}

}  // namespace lagkv::cuda
