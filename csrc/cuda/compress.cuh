// The fused kernel behind compress, compress_ and lag_score.
//
//   out = [rows 0 .. start) ++ kept(0) ++ .. ++ kept(P-2) ++ [rows start + (P-1) L .. N) (docs/method.md 1)
//
// A scoring block takes a run of R partitions of one head (score_run.cuh), copying blocks take the rows
// before and after.
//
// Traffic: reads every element of K and V of the compressed partitions once (a blend: twice, see there), one
// more partition per run, and the kept rows again (from L2); writes the kept rows and the index. Limits:
// blocks of kThreads; L and D are bounded by memory alone (what does not fit in shared memory goes to
// scratch); D > 256 elements that are not 16-byte vectors takes WideRow.
#pragma once

#include "score_run.cuh"

namespace lagkv::cuda {

template <class T>
struct CompressLaunch {
  CompressParams<T> args;        // index is null where the scores alone are wanted
  ScoreTarget<RealOf<T>> score;  // partition 0 of the first head; null where rows are selected here
  bool copies;                   // true where rows go to key_out and value_out
  unsigned char* scratch;        // [scoring blocks, storage.scratch_bytes]
  CompressPlan plan;
};

/// A run of a dense head.
template <class Layout>
struct DenseRun : RunBlock<Layout, CompressLaunch<typename Layout::T>, RunState<typename Layout::T>> {
  using T = typename Layout::T;
  using Tile = StridedTile<T>;

  /// By one thread.
  __device__ __forceinline__ void begin(int64_t job) const {
    const CompressParams<T>& args = this->launch.args;
    const CompressPlan& plan = this->launch.plan;
    const int64_t head = job / plan.runs, b = head / args.heads, h = head % args.heads;
    const int64_t first = job % plan.runs * plan.run;
    for (int side = 0; side < 2; ++side) {
      this->state->set_side(side, side_of(side, args.key, args.value).slot(b, h),
                            side_of(side, args.key_out, args.value_out).slot(b, h),
                            side == 0 ? plan.storage.key_reference : plan.storage.value_reference);
    }
    st_shared(&this->state->start, args.start);
    st_shared(&this->state->first, static_cast<int32_t>(first));
    st_shared(
        &this->state->last,
        static_cast<int32_t>((first + plan.run < plan.partitions ? first + plan.run : plan.partitions) - 1));
    const int64_t rows = output_length(args.length, args.start, args.lag_size, args.keep);
    st_shared(&this->state->index, args.index + head * rows);
    const auto& score = this->launch.score;
    st_shared(&this->state->score, score.data == nullptr ? nullptr : score.data + head * score.stride);
  }

  __device__ __forceinline__ void stage(int /*side*/, int /*partition*/) const {}

  __device__ __forceinline__ Tile tile(int side, int partition) const {
    const auto& own = this->state->side[side];
    const int64_t row_stride = ld_shared(&own.row_stride);
    const int64_t first = ld_shared(&this->state->start) + partition * this->launch.args.lag_size;
    return {ld_shared(&own.rows) + first * row_stride, row_stride, this->dim(side), this->inverse_dim(side),
            this->count()};
  }
};

/// The rows of a head before and after its compressed partitions: where the i-th of them comes from and where
/// it goes.
struct OutsideRows {
  int32_t first;   // i of the first row of a tile
  int32_t start;   // rows before this position stay
  int32_t window;  // first position after the compressed partitions
  int32_t kept;    // rows of the compressed partitions that stay

  /// For the tile that begins with row `first` of those of a head whose first `compressed` partitions lose
  /// tokens.
  __device__ __forceinline__ OutsideRows(int64_t first, int64_t start, int64_t length, int64_t compressed,
                                         int64_t lag_size, int64_t keep)
      : first(static_cast<int32_t>(first)),
        start(static_cast<int32_t>(start < length ? start : length)),
        window(static_cast<int32_t>(this->start + compressed * lag_size)),
        kept(static_cast<int32_t>(compressed * keep)) {}

  __device__ __forceinline__ int32_t from(int j) const {
    const int32_t i = first + j;
    return i < start ? i : i - start + window;
  }
  __device__ __forceinline__ int32_t to(int j) const {
    const int32_t i = first + j;
    return i < start ? i : i + kept;
  }
};

/// kCopyRows of the rows before and after the compressed partitions, and their index.
template <class Layout>
__device__ __forceinline__ void copy_outside(const CompressLaunch<typename Layout::T>& launch, int64_t job) {
  const auto& args = launch.args;
  const auto& plan = launch.plan;
  const int64_t head = job / plan.copy_tiles, b = head / args.heads, h = head % args.heads;
  const int64_t first = job % plan.copy_tiles * kCopyRows;
  const int64_t total = args.length - plan.partitions * args.lag_size;
  const int64_t length = total + plan.partitions * args.keep;
  const int count = static_cast<int>(total - first < kCopyRows ? total - first : kCopyRows);
  const OutsideRows rows(first, args.start, args.length, plan.partitions, args.lag_size, args.keep);
  for (int j = thread_of_block(); j < count; j += kThreads) {
    st_global(args.index + head * length + rows.to(j), rows.from(j));
  }
  if (!launch.copies) return;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    copy_rows<Layout>(side_of(side, args.key_out, args.value_out).slot(b, h),
                      side_of(side, args.key, args.value).slot(b, h), count, rows);
  }
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads, blocks_of(Layout::kBlocks, kScore))
    compress_kernel(const CompressLaunch<typename Layout::T> launch) {
  // Scoring blocks first: they take longer.
  if (blockIdx.x < launch.plan.run_blocks) {
    LAGKV_DYNAMIC_SHARED(shared);
    LAGKV_SHARED(RunState<typename Layout::T>, state, 1);
    LAGKV_SHARED(typename Layout::Real, reduction, 6 * kWarps);
    const DenseRun<Layout> run{{launch, state, shared, reduction}};
    if (thread_of_block() == 0) run.begin(blockIdx.x);
    __syncthreads();
    score_run<Layout, kScore>(run);
  } else {
    copy_outside<Layout>(launch, blockIdx.x - launch.plan.run_blocks);
  }
}

}  // namespace lagkv::cuda
