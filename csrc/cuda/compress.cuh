// The fused kernel behind compress, compress_ and lag_score.
//
//   out = [rows 0 .. start) ++ kept(0) ++ .. ++ kept(P-2) ++ [rows start + (P-1) L .. N)     (docs/method.md
//   1)
//
// A scoring block takes a run of R partitions of one head (score_run.cuh). Copying blocks take the rows
// before and after.
//
// Traffic: reads every element of K and V of the compressed partitions once, one more partition per run, and
// the kept rows again (from L2); writes the kept rows and the index. Limits: blocks of kThreads; L and D are
// bounded by memory alone (what does not fit in shared memory goes to scratch); D > 256 elements that are
// not 16-byte vectors takes WideRow.
#pragma once

#include "score_run.cuh"

namespace lagkv::cuda {

template <class T>
struct CompressLaunch {
  CompressParams<T> args;  // index is null where nothing is selected
  RealOf<T>* score;        // [B, H, P-1, L] contiguous, or null
  bool copies;             // whether rows go to key_out and value_out
  unsigned char* scratch;  // [scoring blocks, storage.scratch_bytes]
  CompressPlan plan;
  int64_t first_job;  // of this grid: more jobs than a grid can have blocks take several
};

/// By one thread.
template <class T>
__device__ __forceinline__ void fill_slots(const CompressLaunch<T>& launch, const RunSlots& slots,
                                           int64_t job) {
  using Slots = RunSlots;
  const CompressParams<T>& args = launch.args;
  const CompressPlan& plan = launch.plan;
  const int64_t head = job / plan.runs, batch = head / args.heads, part = head % args.heads;
  const int64_t first = job % plan.runs * plan.run;
  for (int side = 0; side < 2; ++side) {
    const Rows<const T> x = side_of(side, args.key, args.value);
    const Rows<T> out = side_of(side, args.key_out, args.value_out);
    slots.set_side(side, x.slot(batch, part).row(args.start), x.row_stride, x.dim,
                   out.slot(batch, part).row(args.start), out.row_stride, plan.storage);
  }
  slots.set(Slots::kFirst, first);
  slots.set(Slots::kLast, (first + plan.run < plan.partitions ? first + plan.run : plan.partitions) - 1);
  slots.set(Slots::kStart, args.start);
  slots.set(
      Slots::kIndex,
      args.index + head * output_length(args.length, args.start, args.lag_size, args.keep) + args.start);
  slots.set(Slots::kScores, launch.score + head * plan.partitions * args.lag_size);
}

template <class T>
__device__ __forceinline__ void stage_tile(const CompressLaunch<T>&, const RunSlots&, int, int,
                                           unsigned char*) {}

template <class T>
__device__ __forceinline__ Tile<T> tile_of(const CompressLaunch<T>& launch, const RunSlots& slots, int side,
                                           int partition, unsigned char*) {
  const int64_t row_stride = slots.get(side, RunSlots::kRowStride);
  return {slots.get<const T*>(side, RunSlots::kRows) + partition * launch.args.lag_size * row_stride,
          row_stride, slots.get(side, RunSlots::kDim),
          static_cast<RealOf<T>>(slots.get<double>(side, RunSlots::kShareOfOne)),
          static_cast<int>(launch.args.lag_size)};
}

/// Rows before and after the compressed partitions: kCopyRows of them per block, and their index.
template <class Layout>
__device__ __forceinline__ void copy_run(const CompressLaunch<typename Layout::T>& launch, int64_t job) {
  const auto& args = launch.args;
  const auto& plan = launch.plan;
  const int64_t head = job / plan.copy_tiles, batch = head / args.heads, part = head % args.heads;
  const int64_t first = job % plan.copy_tiles * kCopyRows;
  const int64_t total = args.length - plan.partitions * args.lag_size;
  const int64_t length = total + plan.partitions * args.keep;
  const int count = static_cast<int>(total - first < kCopyRows ? total - first : kCopyRows);
  const Outside outside{args.start, args.start + plan.partitions * args.lag_size,
                        plan.partitions * args.keep};
  const auto from = [&](int j) { return outside.from(first + j); };
  const auto to = [&](int j) { return outside.to(first + j); };
  for (int j = thread_of_block(); j < count; j += kThreads) {
    st_global(args.index + head * length + to(j), static_cast<int32_t>(from(j)));
  }
  if (!launch.copies) return;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const auto x = side_of(side, args.key, args.value);
    const auto out = side_of(side, args.key_out, args.value_out);
    copy_rows<Layout>(out.slot(batch, part).data, out.row_stride, x.slot(batch, part).data, x.row_stride,
                      x.dim, count, to, from);
  }
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads, Layout::kBlocks)
    compress_kernel(const CompressLaunch<typename Layout::T> launch) {
  const int64_t job = launch.first_job + blockIdx.x;
  // Scoring blocks first: they take longer.
  if (job < launch.plan.run_blocks) {
    LAGKV_SHARED(int64_t, fields, RunSlots::kFields);
    const RunSlots slots{fields};
    if (thread_of_block() == 0) fill_slots(launch, slots, job);
    __syncthreads();
    score_run<Layout, kScore>(launch, slots);
  } else {
    copy_run<Layout>(launch, job - launch.plan.run_blocks);
  }
}

}  // namespace lagkv::cuda
