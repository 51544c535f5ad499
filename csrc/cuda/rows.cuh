// How rows lie over lanes, and moving rows. A row of D elements belongs to kLanes neighbouring lanes with kChunks accesses
// of kElements elements each: chunk c of lane g starts at channel (c kLanes + g) kElements. All rows of a warp are read by
// one instruction per chunk, so neighbouring lanes read neighbouring 16 bytes.
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
  // Rows in flight: loads of this many rows are issued before the first is used, 64 bytes a lane where chunks allow.
  static constexpr int kFlight = kChunks >= 4 ? (kElements == 1 ? 2 : 1) : 4 / kChunks;
  using Access = Vec<T, kElements>;
  struct Values {
    Access chunk[kChunks];
  };

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kLanes); }
  static __device__ __forceinline__ int first() { return static_cast<int>(threadIdx.x / kLanes); }
  static __device__ __forceinline__ int rows_per_pass() { return static_cast<int>(blockDim.x / kLanes); }
  static __device__ __forceinline__ int channel(int chunk) { return (chunk * kLanes + lane()) * kElements; }
  static constexpr RowShape shape() { return {kElements, kLanes, kChunks}; }

  /// Zeros where the row ends before the lane's chunk, or where there is no row.
  static __device__ __forceinline__ Values load(const T* row, int dim, bool exists LAGKV_SITE_PARAM) {
    Values x;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      x.chunk[chunk] = Access{};
      if (exists && channel(chunk) < dim) {
        x.chunk[chunk] = ld_global_nc_stream(reinterpret_cast<const Access*>(row + channel(chunk)) LAGKV_SITE_ARG);
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
  static constexpr RowShape shape() { return {0, 0, 0}; }
};

/// Rows `to(j)` of target = rows `from(j)` of source for 0 <= j < count, bit for bit. Source and target do not overlap.
template <class Layout, class To, class From>
__device__ __forceinline__ void copy_rows(typename Layout::T* target, int64_t target_stride, const typename Layout::T* source,
                                          int64_t source_stride, int64_t dim, int count, const To& to, const From& from) {
  if constexpr (Layout::kWide) {
    for (int j = warp_of_block(); j < count; j += warps_of_block()) {
      const auto* in = source + from(j) * source_stride;
      auto* out = target + to(j) * target_stride;
      for (int64_t c = lane_of_warp(); c < dim; c += 32) st_global(out + c, ld_global_nc(in + c));
    }
  } else {
    using Access = typename Layout::Access;
    const int step = Layout::rows_per_pass();
    for (int base = Layout::first(); base < count; base += step * Layout::kFlight) {
      typename Layout::Values x[Layout::kFlight];
#pragma unroll
      for (int n = 0; n < Layout::kFlight; ++n) {
        const int j = base + n * step;
        const bool exists = j < count;
        x[n] = Layout::load(source + (exists ? from(j) : 0) * source_stride, static_cast<int>(dim), exists);
      }
#pragma unroll
      for (int n = 0; n < Layout::kFlight; ++n) {
        const int j = base + n * step;
        if (j >= count) break;
        auto* out = target + to(j) * target_stride;
#pragma unroll
        for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
          const int channel = Layout::channel(chunk);
          if (channel < dim) st_global(reinterpret_cast<Access*>(out + channel), x[n].chunk[chunk]);
        }
      }
    }
  }
}

}  // namespace lagkv::cuda
