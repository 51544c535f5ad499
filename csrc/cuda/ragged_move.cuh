// The second step of compress_ragged_ and compress_paged_: rows move down within their sequence and head.
#pragma once

#include "gather.cuh"
#include "ragged_schedule.cuh"

namespace lagkv::cuda {

template <class W>
struct RaggedMoveLaunch {
  RaggedRows<W> key, value;
  SequenceTable table;
  const int32_t* index;  // [B, H, capacity]
  int64_t heads, capacity, lag_size, keep;
  MovePlan plan;
  int64_t first_job;
};

/// Row j of a sequence = row index[j], for start <= j < new length. Blocks of sequences that lose nothing end
/// at once. Traffic: moved rows once in, once out; pages: and the block table entry of each.
template <class W>
__global__ void __launch_bounds__(kMoveThreads) ragged_move_kernel(const RaggedMoveLaunch<W> launch) {
  using Table = SequenceTable;
  const MovePlan& plan = launch.plan;
  const MoveJob job(plan, launch.first_job + blockIdx.x);
  const int64_t sequence = job.head / launch.heads, head = job.head % launch.heads;
  const int64_t compressed = ld_global_nc(launch.table.at(Table::kCompressed, sequence));
  if (compressed == 0) return;  // all threads of the block
  const int64_t start = ld_global_nc(launch.table.at(Table::kStart, sequence));
  const int64_t length = ld_global_nc(launch.table.at(Table::kLength, sequence));
  const RaggedRows<W>& x = job.is_key ? launch.key : launch.value;
  const Share share(job.columns(plan, x.dim));
  const int64_t column = job.column + share.column;
  move_rows<W>(start, length - compressed * (launch.lag_size - launch.keep), share,
               launch.index + job.head * launch.capacity,
               [&](int64_t position) { return x.row(sequence, head, position, LoadNc{}) + column; });
}

}  // namespace lagkv::cuda
