// The run of a scoring block: partitions of one head, walked from last to first. For each partition it
// streams the key rows and then the value rows, combines their statistics to scores (score.cuh), smooths
// them, selects (select.cuh), writes the kept positions, and copies the kept rows while they are still in
// cache. Where rows are selected later it writes the scores instead.
//
// Rows come from compress.cuh, ragged.cuh and blocks.cuh.
#pragma once

#include "../params.h"
#include "blend_statistic.cuh"
#include "score.cuh"
#include "select.cuh"
#include "smooth.cuh"

namespace lagkv::cuda {

/// Memory of scores that are selected from later. Those of a head lie `stride` after those of the one before.
template <class Real>
struct ScoreTarget {
  Real* data = nullptr;
  int64_t stride = 0;
};

/// Blocks per multiprocessor of a scoring kernel.
constexpr int blocks_of(int blocks, Score score) {
  return score == Score::kBlend ? blend_blocks(blocks) : blocks;
}

/// Key (side 0) or value (side 1), field by field: a reference chosen at run time would copy the parameters.
/// Both have the same address map.
template <class T>
__device__ __forceinline__ Rows<T> side_of(int side, const Rows<T>& key, const Rows<T>& value) {
  return {side == 0 ? key.data : value.data,
          side == 0 ? key.block_stride : value.block_stride,
          side == 0 ? key.head_stride : value.head_stride,
          side == 0 ? key.row_stride : value.row_stride,
          side == 0 ? key.dim : value.dim,
          key.offsets,
          key.block_table,
          key.table_stride,
          key.block_size};
}

/// State of a scoring block's run, of one head of one sequence. It lives in shared memory and is read
/// again in every phase: in registers it would be there for the whole run, where the streaming loop needs
/// them.
template <class T>
struct RunState {
  struct Side {
    const T* rows;  // row 0 of the head
    int64_t row_stride, dim;
    double inverse_dim;
    T* out;  // row 0 of the output's head
    int64_t out_stride;
    int64_t reference;  // offset of its reference (Storage)
  };
  Side side[2];  // key, value
  int64_t start;
  int32_t first, last;  // partitions of the run
  int32_t* index;       // row 0 of the output; unused where nothing is selected
  RealOf<T>* score;     // partition 0, or null

  /// The rows' strides and where they go, by one thread.
  __device__ __forceinline__ void set_side(int side_, const Rows<const T>& x, const Rows<T>& out,
                                           int64_t reference) {
    Side& own = side[side_];
    st_shared(&own.rows, x.data);
    st_shared(&own.row_stride, x.row_stride);
    st_shared(&own.dim, x.dim);
    st_shared(&own.inverse_dim, 1.0 / static_cast<double>(x.dim));
    st_shared(&own.out, out.data);
    st_shared(&own.out_stride, out.row_stride);
    st_shared(&own.reference, reference);
  }
};

/// The memory of a scoring block, and its run.
template <class Layout, class Launch_, class State_>
struct RunBlock {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Launch = Launch_;
  using State = State_;

  const Launch& launch;
  State* state;           // shared
  unsigned char* shared;  // dynamic
  Real* reduction;        // [6 * kWarps] shared

  /// Shared memory at an offset of the plan, or this block's part of the launch's scratch.
  template <class Value>
  __device__ __forceinline__ Store<Value> store(int64_t offset, bool in_scratch) const {
    unsigned char* memory =
        in_scratch ? launch.scratch + block_of_grid() * launch.plan.storage.scratch_bytes : shared;
    return {reinterpret_cast<Value*>(memory + offset), in_scratch};
  }

  /// Statistics of the key (0) and the value (1); norms of wide rows (2); of a blend the cosine statistics of
  /// the key (3) and the value (4).
  __device__ __forceinline__ Store<Real> statistics(int64_t which) const {
    const Storage& storage = launch.plan.storage;
    return store<Real>(storage.statistics, storage.statistics_in_scratch) + which * storage.padded_lag;
  }

  __device__ __forceinline__ PassStores<Real> stores(int side) const {
    const Storage& storage = launch.plan.storage;
    // Only wide rows can have a reference that does not fit into shared memory.
    return {
        store<Real>(ld_shared(&state->side[side].reference), Layout::kWide && storage.reference_in_scratch),
        statistics(side), statistics(2), shared + storage.partial, reduction + 4 * kWarps};
  }

  /// Tells whether a partition is scored, and whether its rows make the reference of the one before: all
  /// of a run but its ends.
  __device__ __forceinline__ bool scores(int partition) const { return partition <= ld_shared(&state->last); }
  __device__ __forceinline__ bool makes_reference(int partition) const {
    return partition > ld_shared(&state->first);
  }

  /// Output row of the first kept row of a partition.
  __device__ __forceinline__ int64_t first_out(int partition) const {
    return ld_shared(&state->start) + partition * launch.args.keep;
  }
  /// Rows of the run's head.
  __device__ __forceinline__ Rows<const T> source(int side) const {
    const auto& own = state->side[side];
    return strided_rows(ld_shared(&own.rows), ld_shared(&own.row_stride), ld_shared(&own.dim));
  }
  __device__ __forceinline__ Rows<T> target(int side) const {
    const auto& own = state->side[side];
    return strided_rows(ld_shared(&own.out), ld_shared(&own.out_stride), ld_shared(&own.dim));
  }

  __device__ __forceinline__ int count() const { return static_cast<int>(launch.args.lag_size); }
  __device__ __forceinline__ int64_t dim(int side) const { return ld_shared(&state->side[side].dim); }
  __device__ __forceinline__ Real inverse_dim(int side) const {
    return static_cast<Real>(ld_shared(&state->side[side].inverse_dim));
  }
};

/// Kept rows: the n-th comes from the n-th position of an index that ascends.
struct KeptRows {
  const int32_t* index;  // of the first kept row
  int32_t first;         // output row of the first

  __device__ __forceinline__ int32_t from(int j) const { return ld_global(index + j); }
  __device__ __forceinline__ int32_t to(int j) const { return first + j; }
};

/// All of a scoring block's run. A `Run` is a RunBlock with stage(side, partition), after which tile(side,
/// partition) gives the rows of a partition. All threads have passed a barrier since the state was filled.
template <class Layout, Score kScore, class Run>
__device__ __forceinline__ void score_run(const Run& run) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Bits = BitsOf<T>;
  LAGKV_SHARED(int, counts, 4 * kWarps);
  LAGKV_SHARED(unsigned, histogram, kBins + 2);
  const auto& args = run.launch.args;

  // From the partition behind the run, which is only looked at, down to the run's first; of each the key,
  // then the value. One counter: two would cost a register while rows stream.
#pragma unroll 1
  for (int pass = 2 * ld_shared(&run.state->last) + 3; pass >= 2 * ld_shared(&run.state->first); --pass) {
    const int partition = pass >> 1, side = ~pass & 1;
    run.stage(side, partition);
    if constexpr (kScore == Score::kBlend) {
      visit_for_blend<Layout>(run, side, partition);
    } else {
      visit_partition<Layout, kScore>(run, side, partition);
    }
    if (side == 0 || !run.scores(partition)) continue;

    const int count = run.count();
    combine_scores<kScore == Score::kBlend ? Score::kStd : kScore>(
        run.statistics(0), run.statistics(1), count, run.dim(0), run.dim(1),
        static_cast<Real>(args.method.value_weight), run.reduction);
    if constexpr (kScore == Score::kBlend) add_cosines(run, static_cast<Real>(args.method.value_weight));
    Store<Real> scores = run.statistics(0);
    if (args.method.smooth > 1) {
      __syncthreads();
      scores = run.statistics(1);  // free since scores are combined
      smooth_scores(run.statistics(0), scores, count, args.method.smooth);
    }
    const Store<Bits> keys = scores.template as<Bits>();
    Real* wanted = ld_shared(&run.state->score);
    for (unsigned t = thread_of_block(); t < static_cast<unsigned>(run.launch.plan.storage.padded_lag);
         t += kThreads) {
      const bool exists = t < static_cast<unsigned>(count);
      if (exists && wanted != nullptr) st_global(wanted + partition * args.lag_size + t, scores.get(t));
      keys.set(t, exists ? ordered(scores.get(t)) : Bits(0));
    }
    __syncthreads();
    if (run.launch.score.data != nullptr) continue;

    const int keep = static_cast<int>(args.keep);
    const int64_t first = ld_shared(&run.state->start) + partition * args.lag_size;
    const int64_t first_out = run.first_out(partition);
    int32_t* index = ld_shared(&run.state->index) + first_out;
    select<Bits>(keys, count, keep, {counts, histogram}, {index, first});
    __syncthreads();
    if (!run.launch.copies) continue;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      copy_rows<Layout>(run.target(side), run.source(side), keep,
                        KeptRows{index, static_cast<int32_t>(first_out)});
    }
  }
}

}  // namespace lagkv::cuda
