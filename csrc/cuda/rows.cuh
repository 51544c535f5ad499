// How rows lie over lanes, and moving rows. A row of D elements belongs to kLanes neighbouring lanes with
// kChunks accesses of kElements elements each: chunk c of lane g starts at channel (c kLanes + g) kElements.
// All rows of a warp are read by one instruction per chunk, so neighbouring lanes read neighbouring 16
// bytes.
#pragma once

#include "block.cuh"
#include "plan.h"

namespace lagkv::cuda {

template <class T_, int kElements_, int kLanes_, int kChunks_>
struct Row {
  using T = T_;
  using Real = RealOf<T>;
  static constexpr bool kWide = false;
  static constexpr int kElements = kElements_, kLanes = kLanes_, kChunks = kChunks_;
  static constexpr int kChannels = kElements * kChunks;  // of a row that one lane holds
  // Rows in flight: loads of this many rows are issued before the first is used, 64 bytes a lane where
  // chunks allow.
  static constexpr int kFlight = kElements == 1 ? 2 : kChunks == 4 ? 1 : 4 / kChunks;
  static constexpr int kBlocks = blocks_per_multiprocessor({kElements, kLanes, kChunks}, sizeof(T), false);
  static constexpr int kRaggedBlocks =
      blocks_per_multiprocessor({kElements, kLanes, kChunks}, sizeof(T), true);
  using Access = Packed<T, kElements>;
  struct Values {
    Access chunk[kChunks];
  };

  /// Channel c of the lane's kChannels, in arithmetic's type.
  static __device__ __forceinline__ void unpack_row(const Values& x, Real* to) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      unpack<T, kElements>(x.chunk[chunk], to + chunk * kElements);
  }

  /// Where a thread is in the layout.
  struct Seat {
    int lane, first;  // lane of its row; its row among those of a pass over the block
    __device__ __forceinline__ Seat() {
      const int thread = thread_of_block();
      lane = thread % kLanes;
      first = thread / kLanes;
    }
    __device__ __forceinline__ int channel(int chunk) const { return (chunk * kLanes + lane) * kElements; }
  };
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr RowShape shape() { return {kElements, kLanes, kChunks}; }

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
};

/// Rows of any length: a warp takes a row, a lane every 32nd element. Nothing of a row is held.
template <class T_>
struct WideRow {
  using T = T_;
  using Real = RealOf<T>;
  static constexpr bool kWide = true;
  static constexpr int kBlocks = blocks_per_multiprocessor({0, 0, 0}, sizeof(T), false);
  static constexpr int kRaggedBlocks = kBlocks;
  static constexpr RowShape shape() { return {0, 0, 0}; }
};

/// Rows `to(j)` of target = rows `from(j)` of source for 0 <= j < count, bit for bit. Source and target do
/// not overlap.
template <class Layout, class To, class From>
__device__ __forceinline__ void copy_rows(typename Layout::T* target, int64_t target_stride,
                                          const typename Layout::T* source, int64_t source_stride,
                                          int64_t dim, int count, const To& to, const From& from) {
  if constexpr (Layout::kWide) {
    const Place place;
    for (int j = place.warp; j < count; j += kWarps) {
      const auto* in = source + from(j) * source_stride;
      auto* out = target + to(j) * target_stride;
      for (int64_t c = place.lane; c < dim; c += 32) st_global(out + c, ld_global_nc(in + c));
    }
  } else {
    using Access = typename Layout::Access;
    const typename Layout::Seat seat;
    constexpr int step = Layout::kRowsPerPass;
#pragma unroll 1
    for (int base = seat.first; base < count; base += step * Layout::kFlight) {
      typename Layout::Values x[Layout::kFlight];
#pragma unroll
      for (int n = 0; n < Layout::kFlight; ++n) {
        const int j = base + n * step;
        const bool exists = j < count;
        const auto* row = source + (exists ? from(j) : 0) * source_stride;
        x[n] = Layout::load(row + seat.channel(0), static_cast<int>(dim), exists, seat);
      }
#pragma unroll
      for (int n = 0; n < Layout::kFlight; ++n) {
        const int j = base + n * step;
        if (j >= count) break;
        auto* out = target + to(j) * target_stride;
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
