// Layouts of rows over lanes, and copies of rows. A row of D elements belongs to kLanes
// neighbouring lanes with kChunks accesses of kElements elements each: chunk c of lane g starts at channel (c
// kLanes + g) kElements. All rows of a warp are read by one instruction per chunk, so neighbouring lanes read
// neighbouring 16 bytes.
#pragma once

#include "../rows.h"
#include "block.cuh"
#include "plan.h"

namespace lagkv::cuda {

// 16-bit types go in pairs: one instruction for two channels.
template <class T>
struct Pair {
  using Type = void;
};
template <>
struct Pair<__half> {
  using Type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

/// N neighbouring elements as one access and as machine words. Not as elements: the compiler would give every
/// 16-bit element a register of its own.
template <class T, int N>
using Packed = std::conditional_t<N * sizeof(T) % 4 == 0, Vec<uint32_t, (N * sizeof(T) + 3) / 4>, Vec<T, N>>;

template <class T, int N>
__device__ __forceinline__ Packed<T, N> filled(T x) {
  Vec<T, N> all;
#pragma unroll
  for (int i = 0; i < N; ++i) all[i] = x;
  return bits_as<Packed<T, N>>(all);
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Packed<T, N>& packed, RealOf<T>* to) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    // The upper half of a word is the float32 that a bfloat16 stands for.
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      to[2 * i] = bits_as<float>(packed[i] << 16);
      to[2 * i + 1] = bits_as<float>(packed[i] & 0xFFFF0000u);
    }
  } else {
    const Vec<T, N> all = bits_as<Vec<T, N>>(packed);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_real(all[i]);
  }
}

/// Element by element: the lower ones of a and b (kHighest = false) or the higher ones.
template <bool kHighest, class T, int N>
__device__ __forceinline__ Packed<T, N> extreme(const Packed<T, N>& a, const Packed<T, N>& b) {
  constexpr bool kPairs = N % 2 == 0 && !std::is_void_v<typename Pair<T>::Type>;
  using Item = std::conditional_t<kPairs, typename Pair<T>::Type, T>;
  constexpr int kItems = kPairs ? N / 2 : N;
  struct Items {
    Item item[kItems];
  };
  Items x = bits_as<Items>(a);
  const Items y = bits_as<Items>(b);
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    x.item[i] = kHighest ? max_nan(x.item[i], y.item[i]) : min_nan(x.item[i], y.item[i]);
  return bits_as<Packed<T, N>>(x);
}

template <class T_, int kElements_, int kLanes_, int kChunks_>
struct Row {
  using T = T_;
  using Real = RealOf<T>;
  static constexpr bool kWide = false;
  static constexpr int kElements = kElements_, kLanes = kLanes_, kChunks = kChunks_;
  static constexpr int kChannels = kElements * kChunks;  // of a row that one lane holds
  // Rows in flight: loads of this many rows are issued before the first is used, 64 bytes a lane where chunks
  // allow.
  static constexpr int kFlight = kElements == 1 ? 2 : kChunks == 4 ? 1 : 4 / kChunks;
  static constexpr int kRowsPerPass = kThreads / kLanes;  // of the block, one row a group of lanes
  static constexpr int kRowsPerRound = kRowsPerPass * kFlight;
  static constexpr int kBlocks = blocks_per_multiprocessor({kElements, kLanes, kChunks}, sizeof(T), false);
  static constexpr int kRaggedBlocks =
      blocks_per_multiprocessor({kElements, kLanes, kChunks}, sizeof(T), true);
  using Access = Packed<T, kElements>;
  struct Values {
    Access chunk[kChunks];
  };

  /// The position of a thread in the layout. Its rows of a round are first, first + kRowsPerPass, ..; it
  /// `owns` the sum of one of them (row_sum).
  struct Seat {
    int lane, first;  // lane of its row; its row among those of a pass over the block
    __device__ __forceinline__ Seat() {
      const int thread = thread_of_block();
      lane = thread % kLanes;
      first = thread / kLanes;
    }
    __device__ __forceinline__ int channel(int chunk) const { return (chunk * kLanes + lane) * kElements; }
    /// Index in a round of the row whose sum this lane gets (row_sum); one lane of those `owns` it.
    __device__ __forceinline__ int owned_row() const {
      return first + lane / (kLanes / kFlight) * kRowsPerPass;
    }
    __device__ __forceinline__ bool owns() const { return lane % (kLanes / kFlight) == 0; }
  };

  /// The lane's channels of a row, in arithmetic's type.
  static __device__ __forceinline__ void unpack_row(const Values& x, Real* to) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      unpack<T, kElements>(x.chunk[chunk], to + chunk * kElements);
  }

  /// A row from the lane's first channel on. Zeros where the row ends before a chunk, or where there is no
  /// row.
  static __device__ __forceinline__ Values load(const T* own, int dim, bool exists,
                                                const Seat& seat LAGKV_SITE_PARAM) {
    Values x;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      x.chunk[chunk] = Access{};
      if (exists && seat.channel(chunk) < dim) {
        x.chunk[chunk] = ld_global_nc_stream(reinterpret_cast<const Access*>(own + chunk * kLanes * kElements)
                                                 LAGKV_SITE_ARG);
      }
    }
    return x;
  }

  /// Sums rows over their lanes: x[n] is the lane's part of row n. At every step a lane gives away half of
  /// the rows that it still holds, so that several rows take little more than one; kLanes / rows neighbouring
  /// lanes end with the sum of row lane / (kLanes / rows). The tree of additions is that of lanes_sum.
  template <int rows>
  static __device__ __forceinline__ Real row_sum(Real (&x)[rows], const Seat& seat) {
    const int lane = opaque(seat.lane);
    int offset = kLanes / 2;
#pragma unroll
    for (int held = rows; held > 1; held /= 2) {
      const bool upper = lane & offset;
#pragma unroll
      for (int n = 0; n < held / 2; ++n) {
        const Real given = upper ? x[n] : x[n + held / 2], kept = upper ? x[n + held / 2] : x[n];
        x[n] = kept + __shfl_xor_sync(kFullWarp, given, offset);
      }
      offset /= 2;
    }
#pragma unroll
    for (; offset > 0; offset /= 2) x[0] += __shfl_xor_sync(kFullWarp, x[0], offset);
    return x[0];
  }

  /// x as the lanes have it that own row n of `rows` rows.
  template <int rows>
  static __device__ __forceinline__ Real of_row(Real x, int n) {
    return rows == 1 ? x : __shfl_sync(kFullWarp, x, n * (kLanes / rows), kLanes);
  }
};

/// Rows of any length: a warp takes a row, a lane every 32nd element. Nothing of a row is held.
template <class T_>
struct WideRow {
  using T = T_;
  using Real = RealOf<T>;
  static constexpr bool kWide = true;
  static constexpr int kBlocks = blocks_per_multiprocessor({0, 0, 0}, sizeof(T), false);
  static constexpr int kRaggedBlocks = kBlocks;
};

/// A number of `offsets` or `block_table` that nobody writes during the kernel.
struct LoadNc {
  __device__ __forceinline__ int32_t operator()(const int32_t* number) const { return ld_global_nc(number); }
};

/// Copies `count` rows bit for bit: the j-th from row moves.from(j) of `source` to row moves.to(j) of
/// `target`, each the rows of one head. Source and target do not overlap.
template <class Layout, class Moves>
__device__ __forceinline__ void copy_rows(const Rows<typename Layout::T>& target,
                                          const Rows<const typename Layout::T>& source, int count,
                                          const Moves& moves) {
  if constexpr (Layout::kWide) {
    const Place place;
    for (int j = place.warp; j < count; j += kWarps) {
      const auto* in = source.row(moves.from(j), LoadNc{});
      auto* out = target.row(moves.to(j), LoadNc{});
      for (int64_t c = place.lane; c < source.dim; c += 32) st_global(out + c, ld_global_nc(in + c));
    }
  } else {
    using Access = typename Layout::Access;
    const typename Layout::Seat seat;
    const int dim = static_cast<int>(source.dim);
    constexpr int step = Layout::kRowsPerPass;
#pragma unroll 1
    for (int base = seat.first; base < count; base += step * Layout::kFlight) {
      typename Layout::Values x[Layout::kFlight];
#pragma unroll
      for (int n = 0; n < Layout::kFlight; ++n) {
        const int j = base + n * step;
        const bool exists = j < count;
        x[n] = Layout::load(source.row(exists ? moves.from(j) : 0, LoadNc{}) + seat.channel(0), dim, exists,
                            seat);
      }
#pragma unroll
      for (int n = 0; n < Layout::kFlight; ++n) {
        const int j = base + n * step;
        if (j >= count) break;
        auto* out = target.row(moves.to(j), LoadNc{});
#pragma unroll
        for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
          const int channel = seat.channel(chunk);
          if (channel < dim) st_global(reinterpret_cast<Access*>(out + channel), x[n].chunk[chunk]);
        }
      }
    }
  }
}

}  // namespace lagkv::cuda
