// Joint work of the threads of a warp and of a block: positions, sums, maxima, prefix sums, arrays in shared
// memory or scratch. Fixed orders throughout, so that results do not depend on timing.
#pragma once

#include "numeric.cuh"
#include "plan.h"

namespace lagkv::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kWarps = kThreads / 32;

/// threadIdx.x, read anew at every call. The compiler would otherwise compute all that follows from it once,
/// before the loop over partitions, and keep it in registers that the streaming loop needs: three blocks per
/// multiprocessor, not two.
__device__ __forceinline__ int thread_of_block() {
#if defined(LAGKV_SIMT)
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

/// blockIdx.x, likewise.
__device__ __forceinline__ int64_t block_of_grid() {
#if defined(LAGKV_SIMT)
  return blockIdx.x;
#else
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
#endif
}

/// x, of which the compiler knows nothing: what follows from it is computed where it is used, not before a
/// loop, and costs no register there.
template <class T>
__device__ __forceinline__ T opaque(T x) {
#if !defined(LAGKV_SIMT)
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
#endif
  return x;
}

/// The position of a thread: made once at the start of each phase.
struct Place {
  int thread, lane, warp;
  __device__ __forceinline__ Place() : thread(thread_of_block()), lane(thread % 32), warp(thread / 32) {}
};

/// Sum over groups of `lanes` neighbouring lanes; every lane of the group gets it, bit for bit the same.
template <int lanes, class Real>
__device__ __forceinline__ Real lanes_sum(Real x) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <class Real>
__device__ __forceinline__ Real warp_larger(Real x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = larger(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

/// An array in shared memory, or in this block's scratch in global memory where it does not fit. On the
/// device both are one generic access where `in_scratch` is known at run time only, and one pointer in
/// registers.
template <class T>
struct Store {
  T* data;
  bool in_scratch;

  __device__ __forceinline__ T get(int64_t i LAGKV_SITE_PARAM) const {
    return in_scratch ? ld_global(data + i LAGKV_SITE_ARG) : ld_shared(data + i LAGKV_SITE_ARG);
  }
  __device__ __forceinline__ void set(int64_t i, const T& x LAGKV_SITE_PARAM) const {
    if (in_scratch) {
      st_global(data + i, x LAGKV_SITE_ARG);
    } else {
      st_shared(data + i, x LAGKV_SITE_ARG);
    }
  }
  template <class Other>
  __device__ __forceinline__ Store<Other> as() const {
    return {reinterpret_cast<Other*>(data), in_scratch};
  }
  __device__ __forceinline__ Store operator+(int64_t offset) const { return {data + offset, in_scratch}; }
};

/// `count` neighbouring numbers in accesses of up to 16 bytes; count times their size must keep the accesses
/// aligned.
template <int count, class Real>
__device__ __forceinline__ void get_row(const Store<Real>& from, int64_t i, Real* to) {
  constexpr int kWide = count * sizeof(Real) >= 16 ? 16 / sizeof(Real) : count;
  const auto wide = from.template as<Vec<Real, kWide>>();
#pragma unroll
  for (int n = 0; n < count / kWide; ++n) {
    const Vec<Real, kWide> part = wide.get(i / kWide + n);
#pragma unroll
    for (int e = 0; e < kWide; ++e) to[n * kWide + e] = part[e];
  }
}
template <int count, class Real>
__device__ __forceinline__ void set_row(const Store<Real>& to, int64_t i, const Real* from) {
  constexpr int kWide = count * sizeof(Real) >= 16 ? 16 / sizeof(Real) : count;
  const auto wide = to.template as<Vec<Real, kWide>>();
#pragma unroll
  for (int n = 0; n < count / kWide; ++n) {
    Vec<Real, kWide> part;
#pragma unroll
    for (int e = 0; e < kWide; ++e) part[e] = from[n * kWide + e];
    wide.set(i / kWide + n, part);
  }
}

/// A number of the key and the same of the value.
template <class Real>
struct KeyValue {
  Real key, value;
};

/// Sums (or maxima) of key and value over the block; every thread gets them. `reduction` [2 * kWarps] shared;
/// the caller uses another one, or a barrier, before the next call.
template <bool kMaximum, class Real>
__device__ __forceinline__ KeyValue<Real> block_reduce(KeyValue<Real> x, Real* reduction) {
  x.key = kMaximum ? warp_larger(x.key) : lanes_sum<32>(x.key);
  x.value = kMaximum ? warp_larger(x.value) : lanes_sum<32>(x.value);
  const Place place;
  if (place.lane == 0) {
    st_shared(reduction + place.warp, x.key);
    st_shared(reduction + kWarps + place.warp, x.value);
  }
  __syncthreads();
  x = {ld_shared(reduction), ld_shared(reduction + kWarps)};
  for (int warp = 1; warp < kWarps; ++warp) {
    const KeyValue<Real> other = {ld_shared(reduction + warp), ld_shared(reduction + kWarps + warp)};
    x.key = kMaximum ? larger(x.key, other.key) : x.key + other.key;
    x.value = kMaximum ? larger(x.value, other.value) : x.value + other.value;
  }
  return x;
}

/// Sum of `x` over the threads before this one, and over all of them. `sums` [kWarps] shared. Ends with a
/// barrier.
struct Scan {
  int64_t before, total;
};
__device__ __forceinline__ Scan block_scan(int64_t x, int64_t* sums) {
  const Place place;
  int64_t sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, sum, offset);
    if (place.lane >= offset) sum += other;
  }
  if (place.lane == 31) st_shared(sums + place.warp, sum);
  __syncthreads();
  Scan scan{sum - x, 0};
  for (int warp = 0; warp < kWarps; ++warp) {
    const int64_t there = ld_shared(sums + warp);
    if (warp < place.warp) scan.before += there;
    scan.total += there;
  }
  __syncthreads();
  return scan;
}

/// The part of a copied head that a thread takes, where neighbouring threads take neighbouring columns.
struct ColumnSeat {
  int row, rows_per_pass, column;
  bool works;  // threads behind the last whole row rest

  __device__ __forceinline__ explicit ColumnSeat(int columns)
      : row(static_cast<int>(threadIdx.x) / columns),
        rows_per_pass(static_cast<int>(blockDim.x) / columns),
        column(static_cast<int>(threadIdx.x) % columns),
        works(row < rows_per_pass) {}
};

}  // namespace lagkv::cuda
