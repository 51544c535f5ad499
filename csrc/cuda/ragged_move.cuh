// The second step of compress_ragged_ and compress_paged_: rows move down within their sequence and head.
#pragma once

#include "gather.cuh"
#include "ragged_schedule.cuh"

namespace lagkv::cuda {

template <class W>
struct RaggedMoveLaunch {
  Rows<W> key, value;
  SequenceTable table;
  const int32_t* index;  // [B, H, capacity]
  int64_t heads, capacity, lag_size, keep;
  int64_t blocks;  // that fill the device
};

/// Row j of a sequence = row index[j], for start <= j < new length. The sequences that lose tokens are few in
/// most calls: how finely columns are sliced follows their number, on the device. Traffic: moved rows once
/// in, once out; per row its index, and of pages its block table entries.
template <class W>
__global__ void __launch_bounds__(kMoveThreads, 2) ragged_move_kernel(const RaggedMoveLaunch<W> launch) {
  using Table = SequenceTable;
  const Table& table = launch.table;
  const int64_t heads = ld_global_nc(table.at(Table::kFirstMove, table.batch)) * launch.heads;
  const MoveSlices slices = move_slices(sizeof(W), launch.key.dim, launch.value.dim, heads, launch.blocks);
#pragma unroll 1
  for (int64_t number = blockIdx.x; number < heads * slices.count(); number += gridDim.x) {
    const MoveJob job(slices, number);
    const int64_t head = job.head % launch.heads;
    const int sequence =
        find_sequence<kMoveThreads>(table, Table::kFirstMove, table.batch, job.head / launch.heads);
    const int64_t start = ld_global_nc(table.at(Table::kStart, sequence));
    const int64_t length = ld_global_nc(table.at(Table::kLength, sequence));
    const int64_t compressed = ld_global_nc(table.at(Table::kCompressed, sequence));
    const Rows<W>& x = job.is_key ? launch.key : launch.value;
    const Share share(job.columns(slices, x.dim));
    const int64_t column = job.column + share.column;
    move_rows<W, kRaggedMoveVectors>(
        start, length - compressed * (launch.lag_size - launch.keep), share,
        launch.index + (sequence * launch.heads + head) * launch.capacity,
        [&](int64_t position) { return x.row(sequence, head, position, LoadNc{}) + column; });
  }
}

}  // namespace lagkv::cuda
