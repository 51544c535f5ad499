// Exact, deterministic choice of the `keep` highest scores: NaN highest, -0 equal to +0, ties to the lower
// position, kept positions in ascending order. Scores come as ordered unsigned integers (numeric.cuh), so
// the choice is the same whatever the method: counting ranks for few scores, radix select for many.
#pragma once

#include "block.cuh"

namespace lagkv::cuda {

constexpr int kRankLimit =
    256;  // scores up to which ranks are counted: count^2 comparisons, but no passes over a histogram
constexpr int kBins = 256;

struct SelectSlots {
  int* counts;          // [2, 2, kWarps] shared
  unsigned* histogram;  // [kBins + 2] shared
};

/// How many scores come before score i: rank(i) = #{j : s_j > s_i} + #{j < i : s_j = s_i}. `keys` is padded
/// with zeros, which are below every score, to a multiple of one 16-byte access.
template <class Bits>
__device__ __forceinline__ int rank_of(const Store<Bits>& keys, int count, int i, Bits mine) {
  constexpr int kWide = 16 / sizeof(Bits);
  const auto wide = keys.template as<Vec<Bits, kWide>>();
  int rank = 0;
#pragma unroll 2
  for (int j = 0; j < count; j += kWide) {
    const Vec<Bits, kWide> others = wide.get(j / kWide);
#pragma unroll
    for (int n = 0; n < kWide; ++n) rank += others[n] > mine || (others[n] == mine && j + n < i) ? 1 : 0;
  }
  return rank;
}

template <class Bits>
struct Threshold {
  Bits key;  // of the last kept score
  int ties;  // how many of the scores equal to it are kept
};

/// Radix select, 8 bits a pass from the highest: the bin that holds the keep-th highest score narrows to one
/// value. 3 barriers a pass. `keys.get(i)` is asked once a pass.
template <class Bits, class Keys>
__device__ __forceinline__ Threshold<Bits> radix_select(int count, int keep, unsigned* histogram,
                                                        const Keys& keys) {
  const Place place;
  Bits prefix = 0, mask = 0;
  int wanted = keep;
#pragma unroll 1
  for (int shift = 8 * sizeof(Bits) - 8; shift >= 0; shift -= 8) {
    for (int bin = place.thread; bin < kBins; bin += kThreads) st_shared(histogram + bin, 0u);
    __syncthreads();
#pragma unroll 2
    for (unsigned i = place.thread; i < static_cast<unsigned>(count); i += kThreads) {
      const Bits bits = keys.get(static_cast<int>(i));
      if ((bits & mask) == prefix) atomicAdd(histogram + static_cast<int>((bits >> shift) & (kBins - 1)), 1u);
    }
    __syncthreads();
    if (place.warp == 0) {
      // Lane 0 takes the 8 highest bins, lane 31 the 8 lowest; a prefix sum over lanes counts the scores
      // above.
      constexpr int kShare = kBins / 32;
      const int top = kBins - 1 - place.lane * kShare;
      int own = 0;
#pragma unroll
      for (int n = 0; n < kShare; ++n) own += static_cast<int>(ld_shared(histogram + top - n));
      int above = own;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, above, offset);
        if (place.lane >= offset) above += other;
      }
      above -= own;
      if (above < wanted && wanted <= above + own) {
        int bin = top, here = static_cast<int>(ld_shared(histogram + bin));
        while (above + here < wanted) {
          above += here;
          --bin;
          here = static_cast<int>(ld_shared(histogram + bin));
        }
        st_shared(histogram + kBins, static_cast<unsigned>(bin));
        st_shared(histogram + kBins + 1, static_cast<unsigned>(above));
      }
    }
    __syncthreads();
    prefix |= static_cast<Bits>(ld_shared(histogram + kBins)) << shift;
    mask |= static_cast<Bits>(kBins - 1) << shift;
    wanted -= static_cast<int>(ld_shared(histogram + kBins + 1));
  }
  return {prefix, wanted};
}

/// emit(slot, i) for the kept positions by radix select. `keys.get(i)`: ordered scores that every thread may
/// read.
template <class Bits, class Keys, class Emit>
__device__ __forceinline__ void select_by_radix(const Keys& keys, int count, int keep,
                                                const SelectSlots& slots, const Emit& emit) {
  const Threshold<Bits> last = radix_select<Bits>(count, keep, slots.histogram, keys);
  compact_positions(
      count, last.ties, slots.counts,
      [&](int i) {
        const Bits bits = keys.get(i);
        return bits > last.key ? Choice::kKeep : bits == last.key ? Choice::kTie : Choice::kDrop;
      },
      emit);
}

/// emit(slot, i) for the kept positions by the method that suits `count`. `keys` holds zeros behind the last
/// score, up to a multiple of 16 bytes.
template <class Bits, class Emit>
__device__ __forceinline__ void select(const Store<Bits>& keys, int count, int keep, const SelectSlots& slots,
                                       const Emit& emit) {
  if (count > kRankLimit) {
    select_by_radix<Bits>(keys, count, keep, slots, emit);
  } else {
    compact_positions(
        count, 0, slots.counts,
        [&](int i) { return rank_of(keys, count, i, keys.get(i)) < keep ? Choice::kKeep : Choice::kDrop; },
        emit);
  }
}

}  // namespace lagkv::cuda
