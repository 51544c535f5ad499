// What a scoring block does with its run of partitions, in the dense kernel and in the ragged one: it walks
// them from last to first. For each partition it streams the key rows and then the value rows
// (partition.cuh), combines their statistics (score.cuh), selects (select.cuh), writes the kept positions,
// and copies the kept rows while they are still in cache.
//
// A `Launch` (CompressLaunch, RaggedLaunch) has args.{lag_size, keep, value_weight, index}, score, copies,
// scratch and plan.storage; stage_tile(launch, slots, side, partition) and tile_of(..) say where rows lie.
#pragma once

#include "partition.cuh"
#include "score.cuh"
#include "select.cuh"

namespace lagkv::cuda {

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

/// What a scoring block knows of its run. It lives in shared memory and is read again in every phase: in
/// registers it would be there for the whole run, where the streaming loop needs them.
struct RunSlots {
  enum Field { kRows, kRowStride, kDim, kShareOfOne, kOut, kOutStride, kReference, kSideFields };
  enum Common { kFirst = 2 * kSideFields, kLast, kStart, kIndex, kScores, kSequence, kHead, kJob, kFields };
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
  /// One side: its rows and its outputs from position `start` on.
  template <class T>
  __device__ __forceinline__ void set_side(int side, const T* rows, int64_t row_stride, int64_t dim, T* out,
                                           int64_t out_stride, const Storage& storage) const {
    const int own = side * kSideFields;
    set(own + kRows, rows);
    set(own + kRowStride, row_stride);
    set(own + kDim, dim);
    set(own + kShareOfOne, bits_as<int64_t>(1.0 / static_cast<double>(dim)));
    set(own + kOut, out);
    set(own + kOutStride, out_stride);
    set(own + kReference, side == 0 ? storage.key_reference : storage.value_reference);
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

/// Shared memory at an offset of the plan, or this block's part of the launch's scratch.
template <class Value, class Launch>
__device__ __forceinline__ Store<Value> store_at(const Launch& launch, unsigned char* shared, int64_t offset,
                                                 bool in_scratch) {
  unsigned char* memory =
      in_scratch ? launch.scratch + blockIdx.x * launch.plan.storage.scratch_bytes : shared;
  return {reinterpret_cast<Value*>(memory + offset), in_scratch};
}

/// All threads have passed a barrier since `slots` was filled.
template <class Layout, Score kScore, class Launch>
__device__ __forceinline__ void score_run(const Launch& launch, const RunSlots& slots) {
  using T = typename Layout::T;
  using Real = typename Layout::Real;
  using Bits = BitsOf<T>;
  using Slots = RunSlots;
  LAGKV_DYNAMIC_SHARED(shared);
  LAGKV_SHARED(Real, reduce_slots, 6 * kWarps);
  LAGKV_SHARED(int, count_slots, 4 * kWarps);
  LAGKV_SHARED(unsigned, histogram, kBins + 2);
  const auto& args = launch.args;
  const Storage& storage = launch.plan.storage;
  const auto store = [&](int64_t offset, bool in_scratch) {
    return store_at<Real>(launch, shared, offset, in_scratch);
  };
  const auto statistics = [&](int64_t which) {
    return store(storage.statistics, storage.statistics_in_scratch) + which * padded_lag(args.lag_size);
  };

  // From the partition behind the run, which is only looked at, down to the run's first.
#pragma unroll 1
  for (int partition = slots.get<int>(Slots::kLast) + 1; partition >= slots.get<int>(Slots::kFirst);
       --partition) {
    const bool scored = partition <= slots.get<int>(Slots::kLast);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      stage_tile(launch, slots, side, partition, shared);
      const auto tile = [&] { return tile_of(launch, slots, side, partition, shared); };
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
                static_cast<int32_t>(slots.get(Slots::kStart) + partition * args.lag_size + t));
    });
    __syncthreads();
    if (!launch.copies) continue;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const int32_t* index = slots.get<const int32_t*>(Slots::kIndex) + partition * args.keep;
      const int64_t out_stride = slots.get(side, Slots::kOutStride);
      const int64_t row_stride = slots.get(side, Slots::kRowStride);
      copy_rows<Layout>(
          slots.get<T*>(side, Slots::kOut) + partition * args.keep * out_stride, out_stride,
          slots.get<const T*>(side, Slots::kRows) - slots.get(Slots::kStart) * row_stride, row_stride,
          slots.get(side, Slots::kDim), keep, [](int j) { return j; },
          [&](int j) { return ld_global(index + j); });
    }
  }
}

/// The rows of a head before and after its compressed partitions: where the i-th of them comes from and
/// where it goes.
struct Outside {
  int64_t start, window;  // position before which rows stay; first position after the compressed partitions
  int64_t kept;           // rows of the compressed partitions that stay

  __device__ __forceinline__ int64_t from(int64_t i) const { return i < start ? i : i - start + window; }
  __device__ __forceinline__ int64_t to(int64_t i) const { return i < start ? i : i + kept; }
};

}  // namespace lagkv::cuda
