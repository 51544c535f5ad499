// compact: rows gathered by index into another tensor, as machine words W of 2 to 16 bytes, whatever they
// hold: dims, strides and pointers are in units of W.
#pragma once

#include "../params.h"
#include "block.cuh"

#if !defined(LAGKV_SIMT)
// CUDA's own, behind assert(), which NDEBUG would switch off.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept
    __attribute__((__noreturn__));
#endif

namespace lagkv::cuda {

template <class W>
struct CompactLaunch {
  CompactParams<W> args;
  CompactPlan plan;
};

/// A position outside x cannot raise an error without waiting for the device: it is a device-side assertion,
/// as in torch's own gather (in the executor: a trap). Nothing outside x is read, and what is written then is
/// never seen.
__device__ __forceinline__ void require_positions_in_range(bool in_range) {
  if (in_range) return;
#if defined(LAGKV_SIMT)
  __trap();
#else
  __assert_fail("lagkv::compact: index must hold positions between 0 and N - 1", __FILE__, __LINE__,
                "compact");
#endif
}

/// out[b, h, j] = x[b, h, index[b, h, j]]. Traffic: the gathered rows and the index read, the output written.
template <class W>
__global__ void __launch_bounds__(kThreads) compact_kernel(const CompactLaunch<W> launch) {
  constexpr int kFlight = 4;
  bool in_range = true;
  const auto& args = launch.args;
  const int64_t job = blockIdx.x;
  const int64_t head = job / launch.plan.tiles, b = head / args.heads, h = head % args.heads;
  const int64_t first = job % launch.plan.tiles * kCopyRows;
  const int rows = static_cast<int>(args.count - first < kCopyRows ? args.count - first : kCopyRows);
  const Rows<const W> x = args.x.slot(b, h);
  const Rows<const int32_t> index = args.index.slot(b, h);
  const Rows<W> out = args.out.slot(b, h);
  for (int64_t left = 0; left < x.dim; left += blockDim.x) {
    const ColumnSeat seat(static_cast<int>(x.dim - left < blockDim.x ? x.dim - left : blockDim.x));
    const int64_t column = left + seat.column;
    for (int row = seat.row; seat.works && row < rows; row += seat.rows_per_pass * kFlight) {
      W word[kFlight];
#pragma unroll
      for (int n = 0; n < kFlight; ++n) {
        const int j = row + n * seat.rows_per_pass;
        if (j >= rows) continue;
        const int64_t position = ld_global_nc(index.row(first + j));
        const bool exists = position >= 0 && position < args.length;
        in_range = in_range && exists;
        word[n] = exists ? ld_global_nc_stream(x.row(position) + column) : W{};
      }
#pragma unroll
      for (int n = 0; n < kFlight; ++n) {
        const int j = row + n * seat.rows_per_pass;
        if (j < rows) st_global(out.row(first + j) + column, word[n]);
      }
    }
  }
  require_positions_in_range(in_range);
}

}  // namespace lagkv::cuda
