// Rows gathered by index: compact (into another tensor) and the second step of compress_ (down in the same
// tensor). Rows are moved as machine words W of 2 to 16 bytes, whatever they hold: dims, strides and
// pointers are in units of W.
#pragma once

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
  int64_t first_job;
};

/// A position outside x cannot raise an error without waiting for the device: it is a device-side assertion,
/// as in torch's own gather (in the executor: a trap). Nothing outside x is read, and what is written then
/// is never seen.
__device__ __forceinline__ void require_positions_in_range(bool in_range) {
  if (in_range) return;
#if defined(LAGKV_SIMT)
  __trap();
#else
  __assert_fail("lagkv::compact: index must hold positions between 0 and N - 1", __FILE__, __LINE__,
                "compact");
#endif
}

/// The rows of a head that a thread takes, where neighbouring threads take neighbouring columns.
struct Share {
  int row, rows_per_step, column;
  bool works;  // threads behind the last whole row rest

  __device__ __forceinline__ explicit Share(int columns)
      : row(static_cast<int>(threadIdx.x) / columns),
        rows_per_step(static_cast<int>(blockDim.x) / columns),
        column(static_cast<int>(threadIdx.x) % columns),
        works(row < rows_per_step) {}
};

/// out[b, h, j] = x[b, h, index[b, h, j]]. Traffic: the gathered rows and the index read, the output written.
template <class W>
__global__ void __launch_bounds__(kThreads) compact_kernel(const CompactLaunch<W> launch) {
  constexpr int kFlight = 4;
  bool in_range = true;
  const auto& args = launch.args;
  const int64_t job = launch.first_job + blockIdx.x;
  const int64_t head = job / launch.plan.tiles, batch = head / args.heads, part = head % args.heads;
  const int64_t first = job % launch.plan.tiles * kCopyRows;
  const int rows = static_cast<int>(args.count - first < kCopyRows ? args.count - first : kCopyRows);
  const auto x_rows = args.x.slot(batch, part);
  const auto index = args.index.slot(batch, part);
  const auto out = args.out.slot(batch, part);
  for (int64_t left = 0; left < args.x.dim; left += blockDim.x) {
    const Share share(static_cast<int>(args.x.dim - left < blockDim.x ? args.x.dim - left : blockDim.x));
    const int64_t column = left + share.column;
    for (int row = share.row; share.works && row < rows; row += share.rows_per_step * kFlight) {
      W x[kFlight];
#pragma unroll
      for (int n = 0; n < kFlight; ++n) {
        const int j = row + n * share.rows_per_step;
        if (j >= rows) continue;
        const int64_t position = ld_global_nc(index.row(first + j));
        const bool exists = position >= 0 && position < args.length;
        in_range = in_range && exists;
        x[n] = exists ? ld_global_nc_stream(x_rows.row(position) + column) : W{};
      }
#pragma unroll
      for (int n = 0; n < kFlight; ++n) {
        const int j = row + n * share.rows_per_step;
        if (j < rows) st_global(out.row(first + j) + column, x[n]);
      }
    }
  }
  require_positions_in_range(in_range);
}

/// Row j = row index[j] for first <= j < rows, in a slice of the columns of one head that this block owns. It
/// goes up in passes: all sources of a pass are in registers before any of its rows is written (the barrier),
/// and sources of later passes lie above everything that is written by then, for index[j] >= j and ascending.
/// `at(position)`: where this thread's column of a row is. Traffic: moved rows once in, once out.
template <class W, int kVectors, class At>
__device__ __forceinline__ void move_rows(int64_t first, int64_t rows, const Share& share,
                                          const int32_t* index, const At& at) {
  for (int64_t pass = first; pass < rows; pass += static_cast<int64_t>(share.rows_per_step) * kVectors) {
    W moved[kVectors];
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int64_t j = pass + n * share.rows_per_step + share.row;
      if (share.works && j < rows) moved[n] = ld_global(at(ld_global_nc(index + j)));
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const int64_t j = pass + n * share.rows_per_step + share.row;
      if (share.works && j < rows) st_global(at(j), moved[n]);
    }
  }
}

/// Which columns of which head a block of a move takes.
struct MoveJob {
  int64_t head;  // of all
  bool is_key;
  int64_t column;

  __device__ __forceinline__ MoveJob(const MoveSlices& slices, int64_t job) {
    const int64_t slice = job % slices.count();
    head = job / slices.count();
    is_key = slice < slices.key_slices;
    column = (is_key ? slice : slice - slices.key_slices) * slices.slice;
  }
  __device__ __forceinline__ int columns(const MoveSlices& slices, int64_t dim) const {
    return static_cast<int>(dim - column < slices.slice ? dim - column : slices.slice);
  }
};

template <class W>
struct MoveLaunch {
  Rows<W> key, value;    // [B, H, N, D]
  const int32_t* index;  // [B, H, N'] ascending, index[j] >= j
  int64_t batch, heads;
  MovePlan plan;
  int64_t first_job;
};

/// x[b, h, j] = x[b, h, index[b, h, j]] for first <= j < rows.
template <class W>
__global__ void __launch_bounds__(kMoveThreads) move_kernel(const MoveLaunch<W> launch) {
  const MovePlan& plan = launch.plan;
  const MoveJob job(plan.slices, launch.first_job + blockIdx.x);
  const Rows<W>& x = job.is_key ? launch.key : launch.value;
  const Share share(job.columns(plan.slices, x.dim));
  W* base = x.slot(job.head / launch.heads, job.head % launch.heads).data + job.column + share.column;
  move_rows<W, kMoveVectors>(plan.first, plan.rows, share, launch.index + job.head * plan.rows,
                             [&](int64_t position) { return base + position * x.row_stride; });
}

}  // namespace lagkv::cuda
