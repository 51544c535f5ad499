// The fused kernel behind compress_blocks: what ragged.cuh does, from the raw blocks of a pool to other
// blocks of it, in one launch.
//
// A scoring block takes a run of partitions of one head of one sequence, if that sequence has so many: the
// grid has one for every run that the target table has room for. One block more per head fills the mixed
// block, and the index behind the kept rows. Each block validates its sequence for itself, so that nothing
// has to run before: a sequence whose numbers are invalid, or that names a block outside the pool, is left
// unchanged, its index -1.
//
// Traffic: as ragged.cuh; and per block the two tables of its sequence, from the first partition to the one
// behind the last. Limits: as compress.cuh.
#pragma once

#include "../blocks.h"
#include "scattered.cuh"

namespace lagkv::cuda {

template <class T>
struct BlocksLaunch {
  BlocksParams<T> args;
  unsigned char* scratch;  // [scoring blocks, storage.scratch_bytes]
  BlocksPlan plan;
  static constexpr bool copies = true;
  static constexpr ScoreTarget<RealOf<T>> score{};  // rows are selected at once
};

/// The numbers of sequence b, without partitions where they or its blocks are invalid: for all threads of the
/// block, after a barrier. The reference behind the window is in use, and with it all that the mixed block
/// takes from there.
template <class T>
__device__ __forceinline__ BlocksSequence valid_sequence(const BlocksParams<T>& args, int64_t b) {
  const BlocksSequence sequence = args.sequence(b, LoadNc{});
  const int32_t* source = args.key.block_table + b * args.key.table_stride;
  const int32_t* target = args.key_out.block_table + b * args.key_out.table_stride;
  const int64_t block_size = args.key.block_size;
  const auto is_outside = [&](const int32_t* entry) {
    const int32_t block = ld_global_nc(entry);
    return block < 0 || block >= args.blocks;
  };
  bool outside = false;
  if (sequence.partitions > 0) {
    const int64_t end = ceil_div(sequence.window + args.lag_size, block_size);
    for (int64_t i = sequence.first / block_size + thread_of_block(); i < end; i += kThreads) {
      outside |= is_outside(source + i);
    }
    for (int64_t i = thread_of_block(); i < sequence.rows() / block_size; i += kThreads) {
      outside |= is_outside(target + i);
    }
    if (sequence.mixed > 0) outside |= is_outside(source + args.sink / block_size);
  }
  return __syncthreads_or(outside) ? BlocksSequence{} : sequence;
}

/// A run of a head of one sequence.
template <class Layout>
struct BlocksRun
    : ScatteredRun<Layout, BlocksLaunch<typename Layout::T>, ScatteredState<typename Layout::T>> {
  using T = typename Layout::T;

  /// By one thread: the partitions first .. last.
  __device__ __forceinline__ void begin(int64_t sequence, int64_t head, int64_t start, int64_t first,
                                        int64_t last) const {
    const BlocksParams<T>& args = this->launch.args;
    const Storage& storage = this->launch.plan.storage;
    for (int side = 0; side < 2; ++side) {
      this->state->set_side(side, side_of(side, args.key, args.value),
                            side_of(side, args.key_out, args.value_out),
                            side == 0 ? storage.key_reference : storage.value_reference);
    }
    st_shared(&this->state->start, start);
    st_shared(&this->state->first, static_cast<int32_t>(first));
    st_shared(&this->state->last, static_cast<int32_t>(last));
    st_shared(&this->state->index, args.index + (sequence * args.heads + head) * args.capacity);
    st_shared(&this->state->score, nullptr);
    st_shared(&this->state->sequence, static_cast<int32_t>(sequence));
    st_shared(&this->state->head, head);
  }

  __device__ __forceinline__ int64_t first_out(int partition) const {
    return partition * this->launch.args.keep;
  }
  __device__ __forceinline__ Rows<const T> source(int side) const {
    const BlocksParams<T>& args = this->launch.args;
    return this->head_of(side_of(side, args.key, args.value));
  }
  __device__ __forceinline__ Rows<T> target(int side) const {
    const BlocksParams<T>& args = this->launch.args;
    return this->head_of(side_of(side, args.key_out, args.value_out));
  }

 private:
  template <class Any>
  __device__ __forceinline__ Rows<Any> head_of(const Rows<Any>& rows) const {
    return rows.head(ld_shared(&this->state->sequence), ld_shared(&this->state->head), LoadNc{});
  }
};

/// Rows of a mixed block: where the j-th of them comes from and where it goes.
struct MixedRows {
  int32_t sink;    // end of the sink
  int32_t part;    // rows of the sink in its last block
  int32_t window;  // token behind the compressed partitions
  int32_t kept;    // target rows before

  __device__ __forceinline__ int32_t from(int j) const {
    return j < part ? sink - part + j : window - part + j;
  }
  __device__ __forceinline__ int32_t to(int j) const { return kept + j; }
};

/// The mixed block of a head, and its index behind the kept rows.
template <class Layout>
__device__ __forceinline__ void fill_mixed(const BlocksParams<typename Layout::T>& args,
                                           const BlocksSequence& sequence, int64_t b, int64_t head) {
  const MixedRows rows{static_cast<int32_t>(args.sink), static_cast<int32_t>(args.part()),
                       static_cast<int32_t>(sequence.window), static_cast<int32_t>(sequence.kept)};
  const int count = static_cast<int>(sequence.mixed);
  int32_t* index = args.index + (b * args.heads + head) * args.capacity + sequence.kept;
  for (int64_t j = thread_of_block(); j < args.capacity - sequence.kept; j += kThreads) {
    st_global(index + j, j < count ? rows.from(static_cast<int>(j)) : -1);
  }
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    copy_rows<Layout>(side_of(side, args.key_out, args.value_out).head(b, head, LoadNc{}),
                      side_of(side, args.key, args.value).head(b, head, LoadNc{}), count, rows);
  }
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads, blocks_of(Layout::kRaggedBlocks, kScore))
    blocks_kernel(const BlocksLaunch<typename Layout::T> launch) {
  LAGKV_DYNAMIC_SHARED(shared);
  LAGKV_SHARED(ScatteredState<typename Layout::T>, state, 1);
  LAGKV_SHARED(typename Layout::Real, reduction, 6 * kWarps);
  const auto& args = launch.args;
  const auto& plan = launch.plan;
  // Scoring blocks first: they take longer.
  const bool scores = blockIdx.x < plan.run_blocks;
  const int64_t head_of_all = scores ? blockIdx.x / plan.runs : blockIdx.x - plan.run_blocks;
  const int64_t b = head_of_all / args.heads, head = head_of_all % args.heads;
  const BlocksSequence sequence = valid_sequence(args, b);
  if (!scores) return fill_mixed<Layout>(args, sequence, b, head);
  const int64_t first = blockIdx.x % plan.runs * plan.run, end = first + plan.run;
  if (first >= sequence.partitions) return;
  const BlocksRun<Layout> run{{{launch, state, shared, reduction}}};
  if (thread_of_block() == 0) {
    run.begin(b, head, sequence.first, first, (end < sequence.partitions ? end : sequence.partitions) - 1);
  }
  __syncthreads();
  score_run<Layout, kScore>(run);
}

}  // namespace lagkv::cuda
