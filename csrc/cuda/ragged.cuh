// The fused kernel behind compress_ragged_, compress_varlen and compress_paged_: what compress.cuh does for
// one head of one length, for sequences that each have their own (schedule.cuh assigns the work).
//
// A grid of as many blocks as the device holds goes through the jobs: runs of partitions to be scored, and
// tiles of the index, with the rows of key and value where packed rows go to a new tensor.
//
// Traffic: as compress.cuh; and per partition and tensor the block table entries of its rows, per job the
// table of the sequences. The index is written to the capacity, -1 past the new length. Limits: as
// compress.cuh.
#pragma once

#include "scattered.cuh"
#include "schedule.cuh"

namespace lagkv::cuda {

template <class T>
struct RaggedLaunch {
  RaggedParams<T> args;
  SequenceTable table;
  unsigned char* scratch;  // [blocks, storage.scratch_bytes]
  RaggedPlan plan;
  bool copies;  // packed rows selected at once; in place the rows move afterwards (move.cuh)
  /// Row 0 of the first head; null where rows are selected at once. Packed rows: row 0 of the tensor.
  ScoreTarget<RealOf<T>> score;
};

/// The score of row 0 of a head of a sequence.
template <class Real>
__device__ __forceinline__ Real* score_row(const ScoreTarget<Real>& score, const int32_t* offsets,
                                           int64_t heads, int64_t sequence, int64_t head) {
  return offsets == nullptr ? score.data + (sequence * heads + head) * score.stride
                            : score.data + head * score.stride + ld_global_nc(offsets + sequence);
}

/// A run, and the job after it.
template <class T>
struct RaggedState : ScatteredState<T> {
  int64_t job;
};

/// A run of a head of one sequence of a ragged batch.
template <class Layout>
struct RaggedRun : ScatteredRun<Layout, RaggedLaunch<typename Layout::T>, RaggedState<typename Layout::T>> {
  using T = typename Layout::T;

  /// By one thread: the run_of_all-th run, which is one of this sequence.
  __device__ __forceinline__ void begin(int sequence, int64_t head, int64_t run_of_all) const {
    const RaggedParams<T>& args = this->launch.args;
    const SequenceTable& table = this->launch.table;
    const Storage& storage = this->launch.plan.storage;
    const int64_t partitions = ld_global_nc(table.compressed(sequence));
    const int64_t run = ld_global_nc(table.run());
    const int64_t first = (run_of_all - ld_global_nc(table.first_run(sequence))) * run;
    for (int side = 0; side < 2; ++side) {
      Rows<const T> x = side_of(side, args.key, args.value);
      Rows<T> out = side_of(side, args.key_out, args.value_out);
      // Rows and outputs are for copies alone, which packed rows make: there rows lie row_stride apart.
      if (this->launch.copies) {
        x = x.head(sequence, head, LoadNc{});
        out = out.head(sequence, head, LoadNc{});
      }
      this->state->set_side(side, x, out, side == 0 ? storage.key_reference : storage.value_reference);
    }
    st_shared(&this->state->start, static_cast<int64_t>(ld_global_nc(table.start(sequence))));
    st_shared(&this->state->first, static_cast<int32_t>(first));
    st_shared(&this->state->last,
              static_cast<int32_t>((first + run < partitions ? first + run : partitions) - 1));
    st_shared(&this->state->index, args.index_of(sequence, head, LoadNc{}));
    const auto& score = this->launch.score;
    st_shared(&this->state->score, score.data == nullptr
                                       ? nullptr
                                       : score_row(score, args.key.offsets, args.heads, sequence, head) +
                                             ld_global_nc(table.start(sequence)));
    st_shared(&this->state->sequence, sequence);
    st_shared(&this->state->head, head);
  }
};

/// A tile of the index that no run writes: before and after the compressed partitions, and -1 past the new
/// length. Packed rows: and the rows themselves.
template <class Layout>
__device__ __forceinline__ void fill_tile(const RaggedLaunch<typename Layout::T>& launch, int sequence,
                                          int64_t head, int64_t tile_of_all) {
  const auto& args = launch.args;
  const SequenceTable& table = launch.table;
  const int64_t start = ld_global_nc(table.start(sequence));
  const int64_t length = ld_global_nc(table.length(sequence));
  const int64_t compressed = ld_global_nc(table.compressed(sequence));
  const int64_t tile = launch.plan.tile;
  const int64_t first = (tile_of_all - ld_global_nc(table.first_tile(sequence))) * tile;
  const int64_t outside = length - compressed * args.lag_size;  // rows that no run copies
  int64_t entries = args.capacity - compressed * args.keep;
  if (args.is_packed()) {
    entries = sequence < args.batch ? outside : args.capacity - ld_global_nc(args.new_offsets + args.batch);
  }
  const int count = static_cast<int>(entries - first < tile ? entries - first : tile);
  const OutsideRows rows(first, start, length, compressed, args.lag_size, args.keep);
  int32_t* index = args.index_of(sequence, head, LoadNc{});
  for (int j = thread_of_block(); j < count; j += kThreads) {
    st_global(index + rows.to(j), rows.from(j) < length ? rows.from(j) : -1);
  }
  if (!launch.copies || first >= outside) return;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const Rows<const typename Layout::T> x =
        side_of(side, args.key, args.value).head(sequence, head, LoadNc{});
    const Rows<typename Layout::T> out =
        side_of(side, args.key_out, args.value_out).head(sequence, head, LoadNc{});
    copy_rows<Layout>(strided_rows(out.data, out.row_stride, out.dim),
                      strided_rows(x.data, x.row_stride, x.dim), count, rows);
  }
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads, blocks_of(Layout::kRaggedBlocks, kScore))
    ragged_kernel(const RaggedLaunch<typename Layout::T> launch) {
  LAGKV_DYNAMIC_SHARED(shared);
  LAGKV_SHARED(RaggedState<typename Layout::T>, state, 1);
  LAGKV_SHARED(typename Layout::Real, reduction, 6 * kWarps);
  const RaggedRun<Layout> run{{{launch, state, shared, reduction}}};
  const auto& args = launch.args;
  const SequenceTable& table = launch.table;
  // The job is read again where it is wanted: in registers it would be there for the whole run.
  if (thread_of_block() == 0) st_shared(&state->job, blockIdx.x);
#pragma unroll 1
  for (;;) {
    __syncthreads();  // the job is there, and nobody reads the state of the one before any more
    const int64_t job = ld_shared(&state->job);
    const int64_t runs = ld_global_nc(table.first_run(args.batch)) * args.heads;
    const bool scores = job < runs;
    const int64_t entries = scores ? args.batch : args.batch + 1;
    const int32_t* firsts = scores ? table.first_run(0) : table.first_tile(0);
    const int64_t item = scores ? job : job - runs;
    if (!scores && item >= ld_global_nc(firsts + entries) * args.heads) break;
    const int sequence = find_sequence<kThreads>(firsts, entries, item / args.heads);
    if (thread_of_block() == 0) {
      st_shared(&state->job, job + gridDim.x);
      if (scores) run.begin(sequence, item % args.heads, item / args.heads);
    }
    if (scores) {
      __syncthreads();
      score_run<Layout, kScore>(run);
    } else {
      fill_tile<Layout>(launch, sequence, item % args.heads, item / args.heads);
    }
  }
}

}  // namespace lagkv::cuda
