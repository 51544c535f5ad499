// Exact, deterministic choice of the `keep` highest scores: NaN highest, -0 equal to +0, ties to the lower
// position, kept positions in ascending order. Scores come as ordered unsigned integers, so the choice is the
// same whatever the method: counting ranks for few scores, radix select for many.
#pragma once

#include "block.cuh"

namespace lagkv::cuda {

constexpr int kRankLimit = 256;  // scores up to which ranks are counted: count^2 comparisons, but no passes
constexpr int kBins = 256;

template <class Real>
struct Order {
  using Bits = uint32_t;
};
template <>
struct Order<double> {
  using Bits = uint64_t;
};
/// The unsigned integer that holds an ordered score of a tensor of T.
template <class T>
using BitsOf = typename Order<RealOf<T>>::Bits;

/// Scores as unsigned integers in the order of the selection. 0 is no score's value.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 0xFFFFFFFFu;
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // -0 + 0 = +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered(double x) {
  if (x != x) return ~uint64_t{0};
  const uint64_t bits = bits_as<uint64_t>(x + 0.0);
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return bits & kSign ? ~bits : bits | kSign;
}

/// Shared memory of a selection.
struct SelectMemory {
  int* counts;          // [2, 2, kWarps]
  unsigned* histogram;  // [kBins + 2]
};

/// The kept positions, ascending: the n-th of them goes to index[n], counted from `first`.
struct KeptIndex {
  int32_t* index;
  int64_t first;

  __device__ __forceinline__ void put(int n, int i) const {
    st_global(index + n, static_cast<int32_t>(first + i));
  }
};

/// The verdict of a selection on a position.
enum class Choice : int { kDrop, kTie, kKeep };

/// Keeps positions by counting: rank(i) = #{j : s_j > s_i} + #{j < i : s_j = s_i}. `keys` is padded with
/// zeros, which are below every score, to a multiple of one 16-byte access.
template <class Bits>
struct ByRank {
  Store<Bits> keys;
  int count, keep;

  __device__ __forceinline__ Choice operator()(int i) const {
    constexpr int kWide = 16 / sizeof(Bits);
    const auto wide = keys.template as<Vec<Bits, kWide>>();
    const Bits mine = keys.get(i);
    int rank = 0;
#pragma unroll 2
    for (int j = 0; j < count; j += kWide) {
      const Vec<Bits, kWide> others = wide.get(j / kWide);
#pragma unroll
      for (int n = 0; n < kWide; ++n) rank += others[n] > mine || (others[n] == mine && j + n < i) ? 1 : 0;
    }
    return rank < keep ? Choice::kKeep : Choice::kDrop;
  }
};

/// Keeps positions by the last kept score, of which `ties` are kept.
template <class Bits, class Keys>
struct ByThreshold {
  Keys keys;
  Bits last;
  int ties;

  __device__ __forceinline__ Choice operator()(int i) const {
    const Bits bits = keys.get(i);
    return bits > last ? Choice::kKeep : bits == last ? Choice::kTie : Choice::kDrop;
  }
};

/// Puts every kept position 0 <= i < count, in ascending order. Of the ties the first `ties` are kept: the
/// lower position wins. `counts` holds two sets, so that one barrier a round is enough.
template <class Chooser, class Kept>
__device__ __forceinline__ void compact_positions(const Chooser& choose, int count, int ties, int* counts,
                                                  const Kept& kept) {
  const Place place;
  const unsigned lower_lanes = (1u << place.lane) - 1u;
  int keeps_before = 0, ties_before = 0;
#pragma unroll 1
  for (unsigned base = 0, round = 0; base < static_cast<unsigned>(count); base += kThreads, ++round) {
    const unsigned i = base + place.thread;
    const Choice choice = i < static_cast<unsigned>(count) ? choose(static_cast<int>(i)) : Choice::kDrop;
    const unsigned keep_lanes = __ballot_sync(kFullWarp, choice == Choice::kKeep);
    const unsigned tie_lanes = __ballot_sync(kFullWarp, choice == Choice::kTie);
    int* set = counts + (round & 1u) * 2 * kWarps;
    if (place.lane == 0) {
      st_shared(set + place.warp, __popc(keep_lanes));
      st_shared(set + kWarps + place.warp, __popc(tie_lanes));
    }
    __syncthreads();
    int keeps = keeps_before + __popc(keep_lanes & lower_lanes),
        tied = ties_before + __popc(tie_lanes & lower_lanes);
    for (int other = 0; other < kWarps; ++other) {
      const int keeps_there = ld_shared(set + other), ties_there = ld_shared(set + kWarps + other);
      keeps_before += keeps_there;
      ties_before += ties_there;
      if (other < place.warp) {
        keeps += keeps_there;
        tied += ties_there;
      }
    }
    if (choice == Choice::kKeep || (choice == Choice::kTie && tied < ties)) {
      kept.put(keeps + (tied < ties ? tied : ties), static_cast<int>(i));
    }
  }
}

/// Radix select, 8 bits a pass from the highest: the bin that holds the keep-th highest score narrows to one
/// value. 3 barriers a pass. `keys.get(i)` is asked once a pass: ordered scores that every thread may read.
template <class Bits, class Keys>
__device__ __forceinline__ ByThreshold<Bits, Keys> radix_select(const Keys& keys, int count, int keep,
                                                                unsigned* histogram) {
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
  return {keys, prefix, wanted};
}

/// Puts the kept positions by radix select.
template <class Bits, class Keys, class Kept>
__device__ __forceinline__ void select_by_radix(const Keys& keys, int count, int keep,
                                                const SelectMemory& memory, const Kept& kept) {
  const auto choose = radix_select<Bits>(keys, count, keep, memory.histogram);
  compact_positions(choose, count, choose.ties, memory.counts, kept);
}

/// Puts the kept positions by the method that suits `count`. `keys` holds zeros behind the last score, up to
/// a multiple of 16 bytes.
template <class Bits>
__device__ __forceinline__ void select(const Store<Bits>& keys, int count, int keep,
                                       const SelectMemory& memory, const KeptIndex& kept) {
  if (count > kRankLimit) {
    select_by_radix<Bits>(keys, count, keep, memory, kept);
  } else {
    compact_positions(ByRank<Bits>{keys, count, keep}, count, 0, memory.counts, kept);
  }
}

}  // namespace lagkv::cuda
