// The fused kernel behind compress, compress_ and lag_score.
//
//   out = [rows 0 .. start) ++ kept(0) ++ .. ++ kept(P-2) ++ [rows start + (P-1) L .. N)       (spec section 1)
//
// A scoring block takes a run of R partitions of one head and walks it from last to first. For each partition it streams the
// key rows and then the value rows (partition.cuh), combines their statistics (score.cuh), selects (select.cuh), writes the
// kept positions, and copies the kept rows while they are still in cache. Copying blocks take the rows before and after.
//
// Traffic: reads every element of K and V of the compressed partitions once, one more partition per run, and the kept
// rows again (from L2); writes the kept rows and the index. Limits: blocks of kThreads; L and D are bounded by memory
// alone (what does not fit in shared memory goes to scratch); D > 256 elements that are not 16-byte vectors takes WideRow.
#pragma once

#include "partition.cuh"
#include "score.cuh"
#include "select.cuh"

namespace lagkv::cuda {

template <class T>
struct CompressLaunch {
  CompressParams<T> args;  // key_out.data is null where no rows are copied, index is null where nothing is selected
  RealOf<T>* score;        // [B, H, P-1, L] contiguous, or null
  unsigned char* scratch;  // [scoring blocks, storage.scratch_bytes]
  CompressPlan plan;
};

template <class Layout, Score kScore>
__device__ __forceinline__ void score_run(const CompressLaunch<typename Layout::T>& launch, int64_t job) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Bits = BitsOf<T>;
  LAGKV_DYNAMIC_SHARED(shared);
  LAGKV_SHARED(Real, reduce_slots, 6 * kMaxWarps);
  LAGKV_SHARED(int, count_slots, 4 * kMaxWarps);
  LAGKV_SHARED(unsigned, histogram, kBins + 2);

  const CompressParams<T>& args = launch.args;
  const CompressPlan& plan = launch.plan;
  unsigned char* scratch = launch.scratch + blockIdx.x * plan.storage.scratch_bytes;
  const auto store = [&](int64_t offset, bool in_scratch) {
    return Store<Real>{reinterpret_cast<Real*>(shared + (in_scratch ? 0 : offset)),
                       reinterpret_cast<Real*>(scratch + (in_scratch ? offset : 0)), in_scratch};
  };
  // Only wide rows can have a reference that does not fit.
  const bool reference_in_scratch = Layout::kWide && plan.storage.reference_in_scratch;
  const int count = static_cast<int>(args.lag_size);
  const int64_t padded = padded_lag(args.lag_size);
  const Store<Real> statistics = store(plan.storage.statistics, plan.storage.statistics_in_scratch);
  const PassStores<Real> key_stores{store(plan.storage.key_reference, reference_in_scratch), statistics,
                                    statistics + 2 * padded, shared + plan.storage.partial, reduce_slots + 4 * kMaxWarps};
  const PassStores<Real> value_stores{store(plan.storage.value_reference, reference_in_scratch), statistics + padded,
                                      statistics + 2 * padded, shared + plan.storage.partial,
                                      reduce_slots + 4 * kMaxWarps};
  const Store<Bits> keys = statistics.template as<Bits>();

  const int64_t head = job / plan.runs;  // of all B * H
  const int64_t first = job % plan.runs * plan.run;
  const int64_t last = (first + plan.run < plan.partitions ? first + plan.run : plan.partitions) - 1;
  const T* key = args.key.row(head / args.heads, head % args.heads, args.start);
  const T* value = args.value.row(head / args.heads, head % args.heads, args.start);
  const auto visit = [&](int64_t partition, Aim aim) {
    const int64_t row = partition * args.lag_size;
    visit_partition<Layout, kScore>({key + row * args.key.row_stride, args.key.row_stride, args.key.dim, count}, aim,
                                    key_stores);
    visit_partition<Layout, kScore>({value + row * args.value.row_stride, args.value.row_stride, args.value.dim, count},
                                    aim, value_stores);
  };

  visit(last + 1, {false, true});
  for (int64_t partition = last; partition >= first; --partition) {
    visit(partition, {true, partition > first});
    Real* score = launch.score == nullptr ? nullptr : launch.score + (head * plan.partitions + partition) * args.lag_size;
    combine_scores<kScore>(statistics, statistics + padded, count, args.key.dim, args.value.dim,
                           static_cast<Real>(args.value_weight), reduce_slots, [&](int t, Real x) {
                             if (score != nullptr) st_global(score + t, x);
                             keys.set(t, ordered(x));
                           });
    if (args.index == nullptr) {
      __syncthreads();
      continue;
    }
    for (int64_t t = count + threadIdx.x; t < padded; t += blockDim.x) keys.set(t, Bits(0));
    __syncthreads();
    const int keep = static_cast<int>(args.keep);
    const int64_t length = output_length(args.length, args.start, args.lag_size, args.keep);
    const int64_t target = args.start + partition * args.keep, source = args.start + partition * args.lag_size;
    int32_t* index = args.index + head * length + target;
    select<Bits>(keys, count, keep, {count_slots, histogram},
                 [&](int slot, int t) { st_global(index + slot, static_cast<int32_t>(source + t)); });
    __syncthreads();
    if (args.key_out.data == nullptr) continue;
    const auto to = [](int j) { return static_cast<int64_t>(j); };
    const auto from = [&](int j) { return ld_global(index + j) - args.start; };
    copy_rows<Layout>(args.key_out.row(head / args.heads, head % args.heads, target), args.key_out.row_stride, key,
                      args.key.row_stride, args.key.dim, keep, to, from);
    copy_rows<Layout>(args.value_out.row(head / args.heads, head % args.heads, target), args.value_out.row_stride, value,
                      args.value.row_stride, args.value.dim, keep, to, from);
  }
}

/// Rows before and after the compressed partitions: kCopyRows of them per block, and their index.
template <class Layout>
__device__ __forceinline__ void copy_run(const CompressLaunch<typename Layout::T>& launch, int64_t job) {
  const auto& args = launch.args;
  const auto& plan = launch.plan;
  const int64_t head = job / plan.copy_tiles, batch = head / args.heads, part = head % args.heads;
  const int64_t first = job % plan.copy_tiles * kCopyRows;
  const int64_t window = args.start + plan.partitions * args.lag_size;  // first row after the compressed partitions
  const int64_t total = args.length - plan.partitions * args.lag_size;
  const int64_t length = total + plan.partitions * args.keep;
  const int count = static_cast<int>(total - first < kCopyRows ? total - first : kCopyRows);
  const bool compressed = plan.partitions > 0;
  const auto from = [&](int j) {
    const int64_t i = first + j;
    return compressed && i >= args.start ? i - args.start + window : i;
  };
  const auto to = [&](int j) {
    const int64_t i = first + j;
    return compressed && i >= args.start ? i + plan.partitions * args.keep : i;
  };
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    st_global(args.index + head * length + to(j), static_cast<int32_t>(from(j)));
  }
  if (args.key_out.data == nullptr) return;
  copy_rows<Layout>(args.key_out.row(batch, part, 0), args.key_out.row_stride, args.key.row(batch, part, 0),
                    args.key.row_stride, args.key.dim, count, to, from);
  copy_rows<Layout>(args.value_out.row(batch, part, 0), args.value_out.row_stride, args.value.row(batch, part, 0),
                    args.value.row_stride, args.value.dim, count, to, from);
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads) compress_kernel(const CompressLaunch<typename Layout::T> launch) {
  const int64_t jobs = launch.plan.run_blocks + launch.plan.copy_blocks;
  // One job a block, unless there are more jobs than a grid can have blocks. Scoring blocks first: they take longer.
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    if (job < launch.plan.run_blocks) {
      score_run<Layout, kScore>(launch, job);
    } else {
      copy_run<Layout>(launch, job - launch.plan.run_blocks);
    }
  }
}

}  // namespace lagkv::cuda
