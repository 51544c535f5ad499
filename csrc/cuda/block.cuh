// What the threads of a warp and of a block do together: sums, maxima, ascending compaction. Fixed orders
// throughout, so that results do not depend on timing.
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

/// Where a thread is: made once at the start of each phase.
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

template <class Real>
struct Two {
  Real key, value;
};

/// Sums (or maxima) of two numbers over the block; every thread gets them. `slots` [2 * kWarps] shared; the
/// caller uses other slots, or a barrier, before the next call.
template <bool kMaximum, class Real>
__device__ __forceinline__ Two<Real> block_two(Two<Real> x, Real* slots) {
  x.key = kMaximum ? warp_larger(x.key) : lanes_sum<32>(x.key);
  x.value = kMaximum ? warp_larger(x.value) : lanes_sum<32>(x.value);
  const Place place;
  if (place.lane == 0) {
    st_shared(slots + place.warp, x.key);
    st_shared(slots + kWarps + place.warp, x.value);
  }
  __syncthreads();
  x = {ld_shared(slots), ld_shared(slots + kWarps)};
  for (int warp = 1; warp < kWarps; ++warp) {
    const Two<Real> other = {ld_shared(slots + warp), ld_shared(slots + kWarps + warp)};
    x.key = kMaximum ? larger(x.key, other.key) : x.key + other.key;
    x.value = kMaximum ? larger(x.value, other.value) : x.value + other.value;
  }
  return x;
}

/// What the selection says of a position.
enum class Choice : int { kDrop, kTie, kKeep };

/// Calls emit(slot, i) for every kept position 0 <= i < count, slots 0, 1, ... in ascending position. Of the
/// ties the first `ties` are kept: the lower position wins. `slots` [2, 2, kWarps] shared: two sets, so that
/// one barrier a round is enough.
template <class Choose, class Emit>
__device__ __forceinline__ void compact_positions(int count, int ties, int* slots, const Choose& choose,
                                                  const Emit& emit) {
  const Place place;
  const unsigned lower_lanes = (1u << place.lane) - 1u;
  int keeps_before = 0, ties_before = 0;
#pragma unroll 1
  for (unsigned base = 0, round = 0; base < static_cast<unsigned>(count); base += kThreads, ++round) {
    const unsigned i = base + place.thread;
    const Choice choice = i < static_cast<unsigned>(count) ? choose(static_cast<int>(i)) : Choice::kDrop;
    const unsigned keep_lanes = __ballot_sync(kFullWarp, choice == Choice::kKeep);
    const unsigned tie_lanes = __ballot_sync(kFullWarp, choice == Choice::kTie);
    int* counts = slots + (round & 1u) * 2 * kWarps;
    if (place.lane == 0) {
      st_shared(counts + place.warp, __popc(keep_lanes));
      st_shared(counts + kWarps + place.warp, __popc(tie_lanes));
    }
    __syncthreads();
    int keeps = keeps_before + __popc(keep_lanes & lower_lanes),
        tied = ties_before + __popc(tie_lanes & lower_lanes);
    for (int other = 0; other < kWarps; ++other) {
      const int keeps_there = ld_shared(counts + other), ties_there = ld_shared(counts + kWarps + other);
      keeps_before += keeps_there;
      ties_before += ties_there;
      if (other < place.warp) {
        keeps += keeps_there;
        tied += ties_there;
      }
    }
    if (choice == Choice::kKeep || (choice == Choice::kTie && tied < ties)) {
      emit(keeps + (tied < ties ? tied : ties), static_cast<int>(i));
    }
  }
}

}  // namespace lagkv::cuda
