// Kernels with one planted fault each. With option = 1 they are right: the twin that the executor must not
// report.
#pragma once

#include <stdexcept>

#include "cuda/simt.cuh"
#include "sample_kernels.cuh"

namespace faulty {

using namespace lagkv;
using samples::Arrays;
using Params = const Arrays<int>;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int global_thread() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// ---- Bounds, alignment, initialisation, roles ----

/// The bounds check lets one thread too many through.
__global__ void read_past_end(Params p) {
  if (global_thread() < p.count + 1 - p.option)
    st_global(p.y + global_thread() % p.count, ld_global(p.x + global_thread()));  // FAULT
}

__global__ void read_before_start(Params p) {
  if (thread() == 0) st_global(p.y, ld_global(p.x + p.option - 1));  // FAULT
}

__global__ void write_past_end(Params p) {
  if (global_thread() < p.count + 1 - p.option) st_global(p.y + global_thread(), 1);  // FAULT
}

/// Dynamic shared memory of 32 ints; thread 0 writes one more.
__global__ void dynamic_shared_past_end(Params p) {
  LAGKV_DYNAMIC_SHARED(raw);
  int* const a = reinterpret_cast<int*>(raw);
  st_shared(a + thread() + (thread() == 0 && !p.option ? 32 : 0), 1);  // FAULT
  if (thread() == 0) st_global(p.y, 1);
}

/// Runs out of one static array; the next one in memory must not hide it.
__global__ void static_shared_past_end(Params p) {
  LAGKV_SHARED(int, first, 32);
  LAGKV_SHARED(int, second, 32);
  st_shared(&first[thread()], 1);
  st_shared(&second[thread()], 2);
  st_global(p.y + thread(), ld_shared(first + thread() + (thread() == 31 && !p.option ? 1 : 0)));  // FAULT
}

__global__ void no_dynamic_shared(Params p) {
  LAGKV_DYNAMIC_SHARED(raw);  // FAULT
  st_shared(raw + thread(), static_cast<unsigned char>(1));
  if (thread() == 0) st_global(p.y, 1);
}

__global__ void misaligned_global(Params p) {
  using V = Vec<int, 4>;
  if (thread() == 0)
    st_global(p.y, ld_global(reinterpret_cast<const V*>(p.x + 1 + 3 * p.option))[0]);  // FAULT
}

/// An array of bytes need not be aligned for the words that are put in it; one of words is.
__global__ void misaligned_shared(Params p) {
  LAGKV_SHARED(unsigned char, bytes, 256);
  LAGKV_SHARED(int, words, 64);
  int* const a = p.option ? words : reinterpret_cast<int*>(bytes);
  st_shared(a + thread(), 1);  // FAULT
  if (thread() == 0) st_global(p.y, 1);
}

/// y += x, but y was never set.
__global__ void uninitialised_global(Params p) {
  if (p.option) st_global(p.y + thread(), 0);
  st_global(p.y + thread(), ld_global(p.y + thread()) + ld_global(p.x + thread()));  // FAULT
}

__global__ void uninitialised_shared(Params p) {
  LAGKV_SHARED(int, a, 33);
  st_shared(&a[thread()], 1);
  if (p.option && thread() == 0) st_shared(&a[32], 1);
  __syncthreads();
  st_global(p.y + thread(), ld_shared(&a[thread() + 1]));  // FAULT
}

/// Only the first block to run writes; the next one must not find the old values.
__global__ void stale_shared(Params p) {
  LAGKV_SHARED(int, a, 32);
  if (blockIdx.x == 0 || p.option) st_shared(&a[thread()], 1);
  st_global(p.y + global_thread(), ld_shared(&a[thread()]));  // FAULT
}

__global__ void write_input(Params p) {
  st_global(p.option ? p.y + thread() : const_cast<int*>(p.x) + thread(), 1);  // FAULT
  if (!p.option) st_global(p.y + thread(), 1);
}

/// Reads back through the read-only path what this launch wrote.
__global__ void stale_read_only_path(Params p) {
  st_global(p.y + thread(), 1);
  const int v = p.option ? ld_global(p.y + thread()) : ld_global_nc(p.y + thread());  // FAULT
  st_global(p.y + thread(), v + 1);
}

/// Reads through the read-only path what this launch writes later.
__global__ void early_read_only_path(Params p) {
  const int v = p.option ? ld_global(p.y + thread()) : ld_global_nc(p.y + thread());
  st_global(p.y + thread(), v + 1);  // FAULT
}

/// The last element is left out.
__global__ void leaves_output_unwritten(Params p) {
  if (global_thread() < p.count - 1 + p.option) st_global(p.y + global_thread(), 1);
}

/// Sets a shared array, so that what follows is judged as a race and not as a read of what nobody has
/// written.
template <int count>
__device__ __forceinline__ void clear(int (&a)[count]) {
  for (int i = thread(); i < count; i += static_cast<int>(blockDim.x)) st_shared(&a[i], 0);
  __syncthreads();
}

// ---- Races ----

__global__ void missing_barrier(Params p) {
  LAGKV_SHARED(int, a, 64);
  clear(a);
  st_shared(&a[thread()], thread());  // FAULT
  if (p.option) __syncthreads();
  st_global(p.y + thread(), ld_shared(&a[thread() ^ 33]));  // FAULT
}

/// Reads, then overwrites what another thread may still have to read.
__global__ void missing_barrier_before_overwrite(Params p) {
  LAGKV_SHARED(int, a, 64);
  st_shared(&a[thread()], thread());
  __syncthreads();
  const int v = ld_shared(&a[thread() ^ 1]);  // FAULT
  if (p.option) __syncthreads();
  st_shared(&a[thread()], v);  // FAULT
  st_global(p.y + thread(), v);
}

__global__ void two_writers(Params p) {
  LAGKV_SHARED(int, a, 64);
  st_shared(&a[p.option ? thread() : thread() / 2], 1);  // FAULT
  st_global(p.y + thread(), 1);
}

/// Two threads write neighbouring bytes of one word (right), or the same byte.
__global__ void two_writers_of_a_byte(Params p) {
  LAGKV_SHARED(unsigned char, a, 64);
  st_shared(&a[p.option ? thread() : thread() / 2], static_cast<unsigned char>(1));  // FAULT
  st_global(p.y + thread(), 1);
}

/// __syncwarp orders the lanes of a warp, not two warps.
__global__ void warp_barrier_across_warps(Params p) {
  LAGKV_SHARED(int, a, 64);
  clear(a);
  st_shared(&a[thread()], thread());  // FAULT
  __syncwarp();
  st_global(p.y + thread(), ld_shared(&a[thread() ^ (p.option ? 1 : 32)]));  // FAULT
}

/// A __syncwarp of half a warp does not order the two halves.
__global__ void half_warp_barrier(Params p) {
  LAGKV_SHARED(int, a, 32);
  clear(a);
  st_shared(&a[thread()], thread());  // FAULT
  __syncwarp(thread() < 16 ? 0x0000FFFFu : 0xFFFF0000u);
  st_global(p.y + thread(), ld_shared(&a[thread() ^ (p.option ? 8 : 16)]));  // FAULT
}

/// Lane 0 meets lane 1, then lane 1 meets lane 2: that orders lane 0 before lane 2. Not the other way round.
__global__ void chain_of_warp_barriers(Params p) {
  LAGKV_SHARED(int, a, 32);
  clear(a);
  st_shared(&a[thread()], thread());  // FAULT
  if (thread() < 2) __syncwarp(0x3u);
  if (thread() == 1 || thread() == 2) __syncwarp(0x6u);
  int v = 0;
  if (p.option ? thread() == 2 : thread() == 0) v = ld_shared(&a[p.option ? 0 : 2]);  // FAULT
  st_global(p.y + thread(), v);
}

/// Shuffles order no memory accesses.
__global__ void shuffle_as_barrier(Params p) {
  LAGKV_SHARED(int, a, 32);
  clear(a);
  st_shared(&a[thread()], thread());  // FAULT
  int v = __shfl_xor_sync(~0u, thread(), 1);
  if (p.option) __syncwarp();
  v += ld_shared(&a[thread() ^ 1]);  // FAULT
  st_global(p.y + thread(), v);
}

/// Atomics do not race with each other, but with plain accesses.
__global__ void plain_access_beside_atomics(Params p) {
  LAGKV_SHARED(int, a, 1);
  if (thread() == 0) st_shared(&a[0], 0);
  __syncthreads();
  atomicAdd(&a[0], 1);  // FAULT
  if (p.option) __syncthreads();
  st_global(p.y + thread(), ld_shared(&a[0]));  // FAULT
}

/// Moves y down by one element in place.
__global__ void global_shift_in_place(Params p) {
  const int v = ld_global(p.y + (thread() + 1) % static_cast<int>(p.count));  // FAULT
  if (p.option) __syncthreads();
  st_global(p.y + thread(), v);  // FAULT
}

__global__ void two_blocks_write(Params p) {
  if (thread() == 0) st_global(p.y + (p.option ? blockIdx.x : 0), 1);  // FAULT
}

__global__ void block_reads_what_another_writes(Params p) {
  const int v = ld_global(p.y + (p.option ? global_thread() : thread()));  // FAULT
  st_global(p.y + global_thread(), v + 1);                                 // FAULT
}

__global__ void blocks_add_up(Params p) {
  if (p.option) {
    atomicAdd(p.y, 1);
  } else {
    st_global(p.y, ld_global(p.y) + 1);  // FAULT
  }
}

// ---- Barriers and masks ----

__global__ void early_exit_before_barrier(Params p) {
  if (thread() >= 40 && !p.option) return;
  __syncthreads();  // FAULT
  st_global(p.y + thread(), 1);
}

__global__ void barrier_in_branch(Params p) {
  if (thread() < 32 || p.option) __syncthreads();  // FAULT
  st_global(p.y + thread(), 1);
}

__global__ void two_barriers_in_branches(Params p) {
  if (thread() < 32 || p.option) {
    __syncthreads();  // FAULT
  } else {
    __syncthreads();  // FAULT
  }
  st_global(p.y + thread(), 1);
}

__global__ void caller_not_in_mask(Params p) {
  const int v = __shfl_xor_sync(p.option ? ~0u : 0x7FFFFFFFu, thread(), 0);  // FAULT
  st_global(p.y + thread(), v);
}

__global__ void masks_differ(Params p) {
  const unsigned mask = thread() < 16 && !p.option ? 0x0000FFFFu : ~0u;
  st_global(p.y + thread(), __shfl_xor_sync(mask, thread(), 1));  // FAULT
}

__global__ void lane_exited(Params p) {
  if (thread() == 31 && !p.option) return;
  st_global(p.y + thread(), __any_sync(~0u, 1));  // FAULT
}

/// The lane exits after the others have begun to wait for it.
__global__ void lane_exits_later(Params p) {
  if (thread() != 0 || p.option) st_global(p.y + thread(), __any_sync(~0u, 1));  // FAULT
}

__global__ void lane_waits_at_barrier(Params p) {
  if (thread() == 5 && !p.option) __syncthreads();  // FAULT
  st_global(p.y + thread(), __any_sync(~0u, 1));    // FAULT
  if (thread() != 5 || p.option) __syncthreads();
}

__global__ void full_mask_in_branch(Params p) {
  int v = thread();
  if (thread() < 16 || p.option) {
    v = __shfl_xor_sync(~0u, v, 1);  // FAULT
  } else {
    v = __shfl_xor_sync(~0u, v, 2);  // FAULT
  }
  st_global(p.y + thread(), v);
}

/// Three lanes, each of which waits for the next one, somewhere else.
__global__ void circle_of_masks(Params p) {
  if (thread() == 0) __syncwarp(p.option ? 0x1u : 0x3u);  // FAULT
  if (thread() == 1) __syncwarp(p.option ? 0x2u : 0x6u);  // FAULT
  if (thread() == 2) __syncwarp(p.option ? 0x4u : 0x5u);  // FAULT
  st_global(p.y + thread(), 1);
}

/// A block of 40 threads: the second warp has 8 lanes.
__global__ void full_mask_in_partial_warp(Params p) {
  const unsigned mask = thread() < 32 || !p.option ? ~0u : 0xFFu;
  st_global(p.y + thread(), __any_sync(mask, 1));  // FAULT
}

__global__ void source_not_in_mask(Params p) {
  if (thread() < 16)
    st_global(p.y + thread(), __shfl_down_sync(0xFFFFu, thread(), 1u, p.option ? 16 : 32));  // FAULT
}

__global__ void odd_width(Params p) {
  st_global(p.y + thread(), __shfl_sync(~0u, thread(), 0, p.option ? 4 : 3));  // FAULT
}

// ---- Accesses that go round the wrappers, and crashes ----

__global__ void plain_global_read(Params p) { st_global(p.y + thread(), p.option ? ld_global(p.x) : *p.x); }

__global__ void plain_shared_write(Params p) {
  LAGKV_SHARED(int, a, 32);
  if (p.option) {
    st_shared(&a[thread()], 1);
  } else {
    *const_cast<volatile int*>(&a[thread()]) = 1;
  }
  st_global(p.y + thread(), 1);
}

__global__ void null_pointer(Params p) { st_global(p.option ? p.y + thread() : nullptr, 1); }  // FAULT

/// Global memory through the wrapper of shared memory.
__global__ void wrong_space(Params p) {
  st_global(p.y + thread(), p.option ? ld_global(p.x) : ld_shared(p.x));  // FAULT
}

__device__ __attribute__((noinline)) int deep(int depth, int v) {
  volatile int local[256];
  for (int i = 0; i < 256; ++i) local[i] = v + i;
  return depth == 0 ? local[v & 255] : deep(depth - 1, local[v & 255]) + local[1];
}
__global__ void stack_overflow(Params p) {
  st_global(p.y + thread(), deep(p.option ? 3 : 1000000, thread()));
}

__global__ void division_by_zero(Params p) {
  volatile int zero = p.option;
  st_global(p.y + thread(), 7 / zero);
}

__global__ void trap(Params p) {
  if (thread() == 3 && !p.option) __trap();  // FAULT
  st_global(p.y + thread(), 1);
}

__global__ void throws(Params p) {
  if (thread() == 3 && !p.option) throw std::runtime_error("thrown inside a kernel");
  st_global(p.y + thread(), 1);
}

/// Lane 0 spins until another one, which never gets its turn, sets a flag.
__global__ void waits_for_a_flag(Params p) {
  LAGKV_SHARED(int, flag, 1);
  if (thread() == 0) st_shared(&flag[0], p.option);
  __syncwarp();
  if (thread() == 0) {
    while (ld_shared(&flag[0]) == 0) {  // FAULT
    }
  }
  st_global(p.y + thread(), 1);
}

}  // namespace faulty
