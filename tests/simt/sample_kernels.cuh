// Correct kernels that show what the executor must get right, and what it must count.
#pragma once

#include "cuda/simt.cuh"

namespace samples {

using namespace lagkv;

template <class T>
struct Arrays {
  const T* x;  // [count]
  T* y;        // [count], or as the kernel says
  int64_t count;
  int32_t option;
};

/// y[warp] = sum of the 32 elements of every warp, by shuffles. option: 0 xor, 1 down, 2 up (the last lane
/// has the sum).
template <class T>
__global__ void __launch_bounds__(256) warp_sum(const Arrays<T> p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  T v = i < p.count ? ld_global_nc(p.x + i) : T(0);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int step = 16; step > 0; step /= 2) {
    if (p.option == 0) v += __shfl_xor_sync(~0u, v, step);
    if (p.option == 1) v += __shfl_down_sync(~0u, v, static_cast<unsigned>(step));
    if (p.option == 2) {
      const T below = __shfl_up_sync(~0u, v, static_cast<unsigned>(32 / (2 * step)));
      if (lane >= 32 / (2 * step)) v += below;
    }
  }
  if (lane == (p.option == 2 ? 31 : 0)) st_global(p.y + i / 32, v);
}

/// y[block] = sum of the block's elements: shuffles, then shared memory, then shuffles again.
template <class T>
__global__ void __launch_bounds__(256) block_sum(const Arrays<T> p) {
  LAGKV_SHARED(T, partial, 8);
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  T v = i < p.count ? ld_global_nc(p.x + i) : T(0);
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  if (threadIdx.x % 32 == 0) st_shared(&partial[threadIdx.x / 32], v);
  __syncthreads();
  if (threadIdx.x < 8) {
    v = ld_shared(&partial[threadIdx.x]);
    for (int step = 4; step > 0; step /= 2) v += __shfl_xor_sync(0xFFu, v, step, 8);
    if (threadIdx.x == 0) st_global(p.y + blockIdx.x, v);
  }
}

/// y = indices of the elements above 0, ascending; y[count] = how many. One block; ballots, and a prefix sum
/// over the warps.
template <class T>
__global__ void __launch_bounds__(256) positive_indices(const Arrays<T> p) {
  LAGKV_DYNAMIC_SHARED(raw);
  int* const warp_counts = reinterpret_cast<int*>(raw);  // [8]
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  int64_t before = 0;
  for (int64_t first = 0; first < p.count; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const bool wanted = i < p.count && ld_global_nc(p.x + i) > T(0);
    const unsigned ballot = __ballot_sync(~0u, wanted);
    if (lane == 0) st_shared(&warp_counts[warp], __popc(ballot));
    __syncthreads();
    int64_t to = before + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
      const int n = ld_shared(&warp_counts[w]);
      before += n;
      if (w < warp) to += n;
    }
    if (wanted) st_global(p.y + to, static_cast<T>(i));
    __syncthreads();
  }
  if (threadIdx.x == 0) st_global(p.y + p.count, static_cast<T>(before));
}

/// y[64] = histogram of x modulo 64: atomics on shared memory, then on global memory.
template <class T>
__global__ void __launch_bounds__(256) histogram(const Arrays<T> p) {
  LAGKV_SHARED(T, bins, 64);
  for (int b = static_cast<int>(threadIdx.x); b < 64; b += static_cast<int>(blockDim.x))
    st_shared(&bins[b], T(0));
  __syncthreads();
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.count;
       i += int64_t{gridDim.x} * blockDim.x) {
    atomicAdd(&bins[static_cast<int>(ld_global_nc(p.x + i)) % 64], T(1));
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < 64; b += static_cast<int>(blockDim.x)) {
    atomicAdd(p.y + b, ld_shared(&bins[b]));
  }
}

/// y [32, 32] = x [32, 32] transposed, one warp row at a time through a tile with `option` words of padding
/// per row.
template <class T>
__global__ void __launch_bounds__(1024) transpose(const Arrays<T> p) {
  LAGKV_DYNAMIC_SHARED(raw);
  T* const tile = reinterpret_cast<T*>(raw);
  const int pitch = 32 + p.option;
  const int column = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  st_shared(tile + row * pitch + column, ld_global_nc(p.x + row * 32 + column));
  __syncthreads();
  st_global(p.y + row * 32 + column, ld_shared(tile + column * pitch + row));
}

/// y = x by accesses of 16 bytes.
template <class T>
__global__ void __launch_bounds__(256) copy_vectors(const Arrays<T> p) {
  using V = Vec<T, 16 / sizeof(T)>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < p.count / static_cast<int64_t>(16 / sizeof(T))) {
    st_global(reinterpret_cast<V*>(p.y) + i, ld_global_nc_stream(reinterpret_cast<const V*>(p.x) + i));
  }
}

/// y[i] = x[i * option]: the lanes are `option` elements apart, and only those with an index below the count
/// work.
template <class T>
__global__ void __launch_bounds__(256) gather_strided(const Arrays<T> p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < p.count) st_global(p.y + i, ld_global_nc(p.x + i * p.option));
}

/// y[i] = x[0] + ... + x[i % 32], lane by lane in a loop of lane-dependent length: requests must be matched
/// by turn.
template <class T>
__global__ void __launch_bounds__(256) uneven_loops(const Arrays<T> p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  T sum = T(0);
  for (int64_t j = 0; j <= i % 32; ++j) sum += ld_global_nc(p.x + j);
  if (i < p.count) st_global(p.y + i, sum);
}

/// y = x reversed within every warp, exchanged through shared memory with __syncwarp alone.
template <class T>
__global__ void __launch_bounds__(256) warp_reverse(const Arrays<T> p) {
  LAGKV_SHARED(T, buffer, 256);
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int turn = 0; turn < 3; ++turn) {  // an odd number of reversals
    st_shared(&buffer[threadIdx.x], turn == 0 ? ld_global_nc(p.x + i) : ld_global(p.y + i));
    __syncwarp();
    st_global(p.y + i, ld_shared(&buffer[threadIdx.x ^ 31]));
    __syncwarp();
  }
}

/// Exercises the collectives lane by lane; y [16, 32 warps' lanes]: row r holds the r-th result.
template <class T>
__global__ void __launch_bounds__(32) collectives(const Arrays<T> p) {
  const int lane = static_cast<int>(threadIdx.x);
  const T v = ld_global_nc(p.x + lane);
  int row = 0;
  const auto put = [&](T result) { st_global(p.y + 32 * row++ + lane, result); };
  put(__shfl_sync(~0u, v, lane * 7));
  put(__shfl_sync(~0u, v, 3, 8));
  put(__shfl_up_sync(~0u, v, 3u, 16));
  put(__shfl_down_sync(~0u, v, 5u, 8));
  put(__shfl_xor_sync(~0u, v, 9, 8));
  put(static_cast<T>(__ballot_sync(~0u, v > T(0)) >> 16));
  put(static_cast<T>(__any_sync(~0u, v > T(1000))));
  put(static_cast<T>(__all_sync(~0u, v > T(-1000))));
  put(static_cast<T>(__popc(__match_any_sync(~0u, static_cast<int>(v) / 4))));
  put(static_cast<T>(__reduce_add_sync(~0u, static_cast<int>(v))));
  put(static_cast<T>(__reduce_max_sync(~0u, static_cast<int>(v))));
  put(static_cast<T>(__reduce_min_sync(~0u, static_cast<unsigned>(v))));
  // Two halves of the warp in different branches, each with its own mask.
  if (lane < 16) {
    put(__shfl_xor_sync(0x0000FFFFu, v, 1));
  } else {
    put(__shfl_xor_sync(0xFFFF0000u, v, 2));
  }
  put(static_cast<T>(__syncthreads_count(v > T(0))));
  put(static_cast<T>(__syncthreads_or(v > T(1000))));
  put(static_cast<T>(__syncthreads_and(v > T(-1000))));
}

/// y[i] = the turn at which thread i came, y[count] = the number of turns: the one kernel that shows the
/// order on purpose.
template <class T>
__global__ void __launch_bounds__(256) tickets(const Arrays<T> p) {
  st_global(p.y + int64_t{blockIdx.x} * blockDim.x + threadIdx.x, atomicAdd(p.y + p.count, T(1)));
}

/// Lanes that meet in parts first and all together later, some earlier than others. y [2, 32].
template <class T>
__global__ void __launch_bounds__(32) meet_in_parts(const Arrays<T> p) {
  const int lane = static_cast<int>(threadIdx.x);
  T v = ld_global_nc(p.x + lane);
  if (lane < 4) v = __shfl_xor_sync(0xFu, v, 1);
  if (lane < 8) v = __shfl_xor_sync(0xFFu, v, 4);
  st_global(p.y + lane, v);
  if (lane >= 16) {
    for (int turn = 0; turn < lane / 8; ++turn)
      v += __shfl_xor_sync(lane < 24 ? 0xFF0000u : 0xFF000000u, v, 1);
  }
  st_global(p.y + 32 + lane, __shfl_xor_sync(~0u, v, 31));
}

/// Work for the clock: `option` xor shuffles per thread.
template <class T>
__global__ void __launch_bounds__(256) many_shuffles(const Arrays<T> p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  T v = ld_global_nc(p.x + i);
  for (int turn = 0; turn < p.option; ++turn) v = __shfl_xor_sync(~0u, v, 1 << turn % 5);
  st_global(p.y + i, v);
}

/// Work for the clock: `option` reads and one write per thread.
template <class T>
__global__ void __launch_bounds__(256) many_reads(const Arrays<T> p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  T v = T(0);
  for (int turn = 0; turn < p.option; ++turn) v += ld_global(p.x + i);
  st_global(p.y + i, v);
}

}  // namespace samples
