// The fused kernel behind compress_ragged_, compress_varlen and compress_paged_: what compress.cuh does for
// one head of one length, for sequences that each have their own (ragged_schedule.cuh says who does what).
//
// A grid of as many blocks as the device holds goes through the jobs: runs of partitions to be scored
// (score_run.cuh), and tiles of the index, with the rows of key and value where packed rows go to a new
// tensor. Where the rows of a partition lie is looked up once per row, before they stream: slots, packed rows
// and pages then look the same, and the block table costs the streaming loop nothing.
//
// Traffic: as compress.cuh; and per partition and tensor the block table entries of its rows, per job the
// table of the sequences. The index is written to the capacity, -1 past the new length. Limits: as
// compress.cuh.
#pragma once

#include "ragged_schedule.cuh"
#include "score_run.cuh"

namespace lagkv::cuda {

template <class T>
struct RaggedLaunch {
  RaggedParams<T> args;
  SequenceTable table;
  unsigned char* scratch;  // [blocks, storage.scratch_bytes]
  RaggedPlan plan;
  bool copies;  // packed rows; in place the rows move afterwards (ragged_move.cuh)
  static constexpr RealOf<T>* score = nullptr;
};

/// By one thread: the run-th run of a head of a sequence.
template <class T>
__device__ __forceinline__ void fill_slots(const RaggedLaunch<T>& launch, const RunSlots& slots, int sequence,
                                           int64_t head, int64_t run_of_all) {
  using Slots = RunSlots;
  using Table = SequenceTable;
  const RaggedParams<T>& args = launch.args;
  const Table& table = launch.table;
  const int64_t start = ld_global_nc(table.at(Table::kStart, sequence));
  const int64_t partitions = ld_global_nc(table.at(Table::kCompressed, sequence));
  const int64_t run = ld_global_nc(table.run());
  const int64_t first = (run_of_all - ld_global_nc(table.at(Table::kFirstRun, sequence))) * run;
  for (int side = 0; side < 2; ++side) {
    const auto x = side_of(side, args.key, args.value);
    const auto out = side_of(side, args.key_out, args.value_out);
    // Rows and outputs are for copies alone, which packed rows make: there rows lie row_stride apart.
    const T* rows = nullptr;
    T* kept = nullptr;
    if (launch.copies) {
      rows = x.row(sequence, head, start, LoadNc{});
      kept = out.row(sequence, head, start, LoadNc{});
    }
    slots.set_side(side, rows, x.row_stride, x.dim, kept, out.row_stride, launch.plan.storage);
  }
  slots.set(Slots::kFirst, first);
  slots.set(Slots::kLast, (first + run < partitions ? first + run : partitions) - 1);
  slots.set(Slots::kStart, start);
  slots.set(Slots::kIndex, args.index_of(sequence, head, LoadNc{}) + start);
  slots.set(Slots::kSequence, sequence);
  slots.set(Slots::kHead, head);
}

template <class T>
__device__ __forceinline__ Store<const T*> staged_rows(const RaggedLaunch<T>& launch, unsigned char* shared) {
  const Storage& storage = launch.plan.storage;
  return store_at<const T*>(launch, shared, storage.rows, storage.rows_in_scratch);
}

/// Where the rows of a partition lie. All threads have passed a barrier since the last tile was read; ends
/// with one.
template <class T>
__device__ __forceinline__ void stage_tile(const RaggedLaunch<T>& launch, const RunSlots& slots, int side,
                                           int partition, unsigned char* shared) {
  const auto x = side_of(side, launch.args.key, launch.args.value);
  const auto rows = staged_rows(launch, shared);
  const int64_t first = slots.get(RunSlots::kStart) + partition * launch.args.lag_size;
#pragma unroll 1
  for (int64_t t = thread_of_block(); t < launch.args.lag_size; t += kThreads) {
    rows.set(t, x.row(slots.get(RunSlots::kSequence), slots.get(RunSlots::kHead), first + t, LoadNc{}));
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ ScatteredTile<T> tile_of(const RaggedLaunch<T>& launch, const RunSlots& slots,
                                                    int side, int /*partition*/, unsigned char* shared) {
  return {staged_rows(launch, shared), slots.get(side, RunSlots::kDim),
          static_cast<RealOf<T>>(slots.get<double>(side, RunSlots::kShareOfOne)),
          static_cast<int>(launch.args.lag_size)};
}

/// A tile of the index that no run writes: before and after the compressed partitions, and -1 past the new
/// length. Packed rows: and the rows themselves.
template <class Layout>
__device__ __forceinline__ void fill_tile(const RaggedLaunch<typename Layout::T>& launch, int sequence,
                                          int64_t head, int64_t tile_of_all) {
  using Table = SequenceTable;
  const auto& args = launch.args;
  const Table& table = launch.table;
  const int64_t start = ld_global_nc(table.at(Table::kStart, sequence));
  const int64_t length = ld_global_nc(table.at(Table::kLength, sequence));
  const int64_t compressed = ld_global_nc(table.at(Table::kCompressed, sequence));
  const int64_t tile = launch.plan.tile;
  const int64_t first = (tile_of_all - ld_global_nc(table.at(Table::kFirstTile, sequence))) * tile;
  const int64_t stay = length - compressed * args.lag_size;  // rows that no run copies
  int64_t entries = args.capacity - compressed * args.keep;
  if (args.is_packed()) {
    entries = sequence < args.batch ? stay : args.capacity - ld_global_nc(args.new_offsets + args.batch);
  }
  const int count = static_cast<int>(entries - first < tile ? entries - first : tile);
  const Outside outside{start, start + compressed * args.lag_size, compressed * args.keep};
  const auto from = [&](int j) { return outside.from(first + j); };
  const auto to = [&](int j) { return outside.to(first + j); };
  int32_t* index = args.index_of(sequence, head, LoadNc{});
  for (int j = thread_of_block(); j < count; j += kThreads) {
    st_global(index + to(j), static_cast<int32_t>(from(j) < length ? from(j) : -1));
  }
  if (!launch.copies || first >= stay) return;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const auto x = side_of(side, args.key, args.value);
    const auto out = side_of(side, args.key_out, args.value_out);
    copy_rows<Layout>(out.row(sequence, head, 0, LoadNc{}), out.row_stride,
                      x.row(sequence, head, 0, LoadNc{}), x.row_stride, x.dim, count, to, from);
  }
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads, Layout::kRaggedBlocks)
    ragged_kernel(const RaggedLaunch<typename Layout::T> launch) {
  using Table = SequenceTable;
  LAGKV_SHARED(int64_t, fields, RunSlots::kFields);
  const RunSlots slots{fields};
  const auto& args = launch.args;
  const Table& table = launch.table;
  // The job is read again where it is wanted: in registers it would be there for the whole run.
  if (thread_of_block() == 0) slots.set(RunSlots::kJob, blockIdx.x);
#pragma unroll 1
  for (;;) {
    __syncthreads();  // the job is there, and nobody reads the slots of the one before any more
    const int64_t job = slots.get(RunSlots::kJob);
    const int64_t runs = ld_global_nc(table.at(Table::kFirstRun, args.batch)) * args.heads;
    const bool scores = job < runs;
    const int64_t entries = scores ? args.batch : args.batch + 1;
    const Table::Column firsts = scores ? Table::kFirstRun : Table::kFirstTile;
    const int64_t item = scores ? job : job - runs;
    if (!scores && item >= ld_global_nc(table.at(firsts, entries)) * args.heads) break;
    const int sequence = find_sequence<kThreads>(table, firsts, entries, item / args.heads);
    if (thread_of_block() == 0) {
      slots.set(RunSlots::kJob, job + gridDim.x);
      if (scores) fill_slots(launch, slots, sequence, item % args.heads, item / args.heads);
    }
    if (scores) {
      __syncthreads();
      score_run<Layout, kScore>(launch, slots);
    } else {
      fill_tile<Layout>(launch, sequence, item % args.heads, item / args.heads);
    }
  }
}

}  // namespace lagkv::cuda
