// The fused kernel behind compress, compress_ and lag_score.
//
//   out = [rows 0 .. start) ++ kept(0) ++ .. ++ kept(P-2) ++ [rows start + (P-1) L .. N)     (spec section 1)
//
// A scoring block takes a run of R partitions of one head and walks it from last to first. For each
// partition it streams the key rows and then the value rows (partition.cuh), combines their statistics
// (score.cuh), selects (select.cuh), writes the kept positions, and copies the kept rows while they are
// still in cache. Copying blocks take the rows before and after.
//
// Traffic: reads every element of K and V of the compressed partitions once, one more partition per run, and
// the kept rows again (from L2); writes the kept rows and the index. Limits: blocks of kThreads; L and D are
// bounded by memory alone (what does not fit in shared memory goes to scratch); D > 256 elements that are
// not 16-byte vectors takes WideRow.
#pragma once

#include "partition.cuh"
#include "score.cuh"
#include "select.cuh"

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

/// Key (side 0) or value (side 1), field by field: a reference chosen at run time would copy the parameters.
template <class T>
__device__ __forceinline__ StridedRows<T> side_of(int side, const StridedRows<T>& key,
                                                  const StridedRows<T>& value) {
  return {side == 0 ? key.data : value.data, side == 0 ? key.batch_stride : value.batch_stride,
          side == 0 ? key.head_stride : value.head_stride, side == 0 ? key.row_stride : value.row_stride,
          side == 0 ? key.dim : value.dim};
}

/// What a scoring block knows of its run. It lives in shared memory and is read again in every phase: in
/// registers it would be there for the whole run, where the streaming loop needs them.
struct RunSlots {
  enum Field { kRows, kRowStride, kDim, kShareOfOne, kOut, kOutStride, kReference, kSideFields };
  enum Common { kFirst = 2 * kSideFields, kLast, kIndex, kScores, kFields };
  int64_t* fields;  // [kFields] shared

  /// Key (side 0) or value (side 1).
  template <class Value = int64_t>
  __device__ __forceinline__ Value get(int side, Field field) const {
    return as<Value>(ld_shared(fields + side * kSideFields + field));
  }
  template <class Value = int64_t>
  __device__ __forceinline__ Value get(Common field) const {
    return as<Value>(ld_shared(fields + field));
  }
  __device__ __forceinline__ void set(int place, int64_t value) const { st_shared(fields + place, value); }
  template <class T>
  __device__ __forceinline__ void set(int place, T* value) const {
    set(place, reinterpret_cast<int64_t>(value));
  }

  /// By one thread. Rows and outputs from position `start` on.
  template <class T>
  __device__ __forceinline__ void fill(const CompressLaunch<T>& launch, int64_t job) const {
    const CompressParams<T>& args = launch.args;
    const CompressPlan& plan = launch.plan;
    const int64_t head = job / plan.runs, batch = head / args.heads, part = head % args.heads;
    const int64_t first = job % plan.runs * plan.run;
    for (int side = 0; side < 2; ++side) {
      const StridedRows<const T> x = side_of(side, args.key, args.value);
      const StridedRows<T> out = side_of(side, args.key_out, args.value_out);
      const int own = side * kSideFields;
      set(own + kRows, x.row(batch, part, args.start));
      set(own + kRowStride, x.row_stride);
      set(own + kDim, x.dim);
      set(own + kShareOfOne, bits_as<int64_t>(1.0 / static_cast<double>(x.dim)));
      set(own + kOut, out.row(batch, part, args.start));
      set(own + kOutStride, out.row_stride);
      set(own + kReference, side == 0 ? plan.storage.key_reference : plan.storage.value_reference);
    }
    set(kFirst, first);
    set(kLast, (first + plan.run < plan.partitions ? first + plan.run : plan.partitions) - 1);
    set(kIndex,
        args.index + head * output_length(args.length, args.start, args.lag_size, args.keep) + args.start);
    set(kScores, launch.score + head * plan.partitions * args.lag_size);
  }

 private:
  template <class Value>
  static __device__ __forceinline__ Value as(int64_t value) {
    if constexpr (std::is_pointer_v<Value>) {
      return reinterpret_cast<Value>(value);
    } else if constexpr (std::is_same_v<Value, double>) {
      return bits_as<double>(value);
    } else {
      return static_cast<Value>(value);
    }
  }
};

template <class Layout, Score kScore>
__device__ __forceinline__ void score_run(const CompressLaunch<typename Layout::T>& launch, int64_t job) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Bits = BitsOf<T>;
  using Slots = RunSlots;
  LAGKV_DYNAMIC_SHARED(shared);
  LAGKV_SHARED(Real, reduce_slots, 6 * kWarps);
  LAGKV_SHARED(int, count_slots, 4 * kWarps);
  LAGKV_SHARED(unsigned, histogram, kBins + 2);
  LAGKV_SHARED(int64_t, run_slots, Slots::kFields);
  const CompressParams<T>& args = launch.args;
  const Storage& storage = launch.plan.storage;
  const auto store = [&](int64_t offset, bool in_scratch) {
    unsigned char* memory = in_scratch ? launch.scratch + blockIdx.x * storage.scratch_bytes : shared;
    return Store<Real>{reinterpret_cast<Real*>(memory + offset), in_scratch};
  };
  const auto statistics = [&](int64_t which) {
    return store(storage.statistics, storage.statistics_in_scratch) + which * padded_lag(args.lag_size);
  };
  const Slots slots{run_slots};
  if (thread_of_block() == 0) slots.fill(launch, job);
  __syncthreads();

  // From the partition behind the run, which is only looked at, down to the run's first.
#pragma unroll 1
  for (int partition = slots.get<int>(Slots::kLast) + 1; partition >= slots.get<int>(Slots::kFirst);
       --partition) {
    const bool scored = partition <= slots.get<int>(Slots::kLast);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const auto tile = [&] {
        const int64_t row_stride = slots.get(side, Slots::kRowStride);
        return Tile<T>{slots.get<const T*>(side, Slots::kRows) + partition * args.lag_size * row_stride,
                       row_stride, slots.get(side, Slots::kDim),
                       static_cast<Real>(slots.get<double>(side, Slots::kShareOfOne)),
                       static_cast<int>(args.lag_size)};
      };
      const auto stores = [&] {
        // Only wide rows can have a reference that does not fit into shared memory.
        return PassStores<Real>{
            store(slots.get(side, Slots::kReference), Layout::kWide && storage.reference_in_scratch),
            statistics(side), statistics(2), shared + storage.partial, reduce_slots + 4 * kWarps};
      };
      visit_partition<Layout, kScore>({scored, partition > slots.get<int>(Slots::kFirst)}, tile, stores);
    }
    if (!scored) continue;

    const int count = static_cast<int>(args.lag_size);
    const Store<Bits> keys = statistics(0).template as<Bits>();
    combine_scores<kScore>(statistics(0), statistics(1), count, slots.get(0, Slots::kDim),
                           slots.get(1, Slots::kDim), static_cast<Real>(args.value_weight), reduce_slots,
                           [&](int t, Real x) {
                             if (launch.score != nullptr) {
                               st_global(slots.get<Real*>(Slots::kScores) + partition * args.lag_size + t, x);
                             }
                             keys.set(t, ordered(x));
                           });
    if (args.index != nullptr) {
      for (int64_t t = count + thread_of_block(); t < padded_lag(count); t += kThreads) keys.set(t, Bits(0));
    }
    __syncthreads();
    if (args.index == nullptr) continue;

    const int keep = static_cast<int>(args.keep);
    select<Bits>(keys, count, keep, {count_slots, histogram}, [&](int slot, int t) {
      st_global(slots.get<int32_t*>(Slots::kIndex) + partition * args.keep + slot,
                static_cast<int32_t>(args.start + partition * args.lag_size + t));
    });
    __syncthreads();
    if (!launch.copies) continue;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const int32_t* index = slots.get<const int32_t*>(Slots::kIndex) + partition * args.keep;
      const int64_t out_stride = slots.get(side, Slots::kOutStride);
      copy_rows<Layout>(
          slots.get<T*>(side, Slots::kOut) + partition * args.keep * out_stride, out_stride,
          slots.get<const T*>(side, Slots::kRows) - args.start * slots.get(side, Slots::kRowStride),
          slots.get(side, Slots::kRowStride), slots.get(side, Slots::kDim), keep, [](int j) { return j; },
          [&](int j) { return ld_global(index + j); });
    }
  }
}

/// Rows before and after the compressed partitions: kCopyRows of them per block, and their index.
template <class Layout>
__device__ __forceinline__ void copy_run(const CompressLaunch<typename Layout::T>& launch, int64_t job) {
  const auto& args = launch.args;
  const auto& plan = launch.plan;
  const int64_t head = job / plan.copy_tiles, batch = head / args.heads, part = head % args.heads;
  const int64_t first = job % plan.copy_tiles * kCopyRows;
  const int64_t window =
      args.start + plan.partitions * args.lag_size;  // first row after the compressed partitions
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
  for (int j = thread_of_block(); j < count; j += kThreads) {
    st_global(args.index + head * length + to(j), static_cast<int32_t>(from(j)));
  }
  if (!launch.copies) return;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const auto x = side_of(side, args.key, args.value);
    const auto out = side_of(side, args.key_out, args.value_out);
    copy_rows<Layout>(out.row(batch, part, 0), out.row_stride, x.row(batch, part, 0), x.row_stride, x.dim,
                      count, to, from);
  }
}

template <class Layout, Score kScore>
__global__ void __launch_bounds__(kThreads, Layout::kBlocks)
    compress_kernel(const CompressLaunch<typename Layout::T> launch) {
  const int64_t job = launch.first_job + blockIdx.x;
  // Scoring blocks first: they take longer.
  if (job < launch.plan.run_blocks) {
    score_run<Layout, kScore>(launch, job);
  } else {
    copy_run<Layout>(launch, job - launch.plan.run_blocks);
  }
}

}  // namespace lagkv::cuda
