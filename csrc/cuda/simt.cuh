// The one header every kernel file includes: CUDA's own names, and memory accesses through wrappers that are
// the identity on the device and observable in the executor of tests/simt (LAGKV_SIMT), which runs these
// files on the CPU.
//
// Operations that kernel code may use:
//   * threadIdx, blockIdx, blockDim, gridDim, __syncthreads[_and|_or|_count], __syncwarp, warp shuffles and
//     votes, __match_*_sync, __reduce_*_sync, atomics, __popc, __ffs, __clz, bit casts, math and the half and
//     bfloat16 conversions: plain CUDA.
//   * memory: ld_* and st_* below. A plain dereference of a global or shared pointer works on the
//     device but faults in the executor (on purpose: what it cannot see it cannot check).
//   * shared memory: LAGKV_DYNAMIC_SHARED and LAGKV_SHARED below, nowhere else.
// A kernel takes one params struct by value:
//   template <class T> __global__ void __launch_bounds__(256) kernel(const Params<T> params);
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(LAGKV_SIMT)

#include <simt/device.h>

#else

// Dynamic shared memory as `unsigned char* name`, aligned to 16 bytes.
#define LAGKV_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// Static shared memory as an array `type name[count]`; `count` is a constant, `type` has no bare comma.
#define LAGKV_SHARED(type, name, count) __shared__ type name[count]

// For a device function that wraps accesses: `T get(const T* p LAGKV_SITE_PARAM)` that calls
// `ld_global(p LAGKV_SITE_ARG)` lets the executor name and count the caller's line instead of the wrapper's.
// Nothing on the device.
#define LAGKV_SITE_PARAM
#define LAGKV_SITE_ARG

#endif

namespace lagkv {

/// N elements that move as one access; sizeof(T) * N must be 1, 2, 4, 8 or 16.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

#if !defined(LAGKV_SIMT)

namespace detail {

// The machine word that carries an access of a given size, so that it is one instruction whatever T is.
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <class T>
using WordOf = typename Word<sizeof(T)>::type;

// Keeps an argument out of deduction: st_global(float_pointer, 1) stores a float.
template <class T>
struct Identity {
  using type = T;
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
__device__ __forceinline__ const WordOf<T>* word(const T* p) {
  return reinterpret_cast<const WordOf<T>*>(p);
}
template <class T>
__device__ __forceinline__ WordOf<T>* word(T* p) {
  return reinterpret_cast<WordOf<T>*>(p);
}

// Non-volatile on purpose: data read through .nc do not change, so the compiler may move and merge loads.
#define LAGKV_LD_NC "ld.global.nc.L1::no_allocate.L2::128B"
__device__ __forceinline__ uint4 ld_nc_stream(const uint4* p) {
  uint4 v;
  asm(LAGKV_LD_NC ".v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(__cvta_generic_to_global(p)));
  return v;
}
__device__ __forceinline__ uint2 ld_nc_stream(const uint2* p) {
  uint2 v;
  asm(LAGKV_LD_NC ".v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(__cvta_generic_to_global(p)));
  return v;
}
__device__ __forceinline__ unsigned int ld_nc_stream(const unsigned int* p) {
  unsigned int v;
  asm(LAGKV_LD_NC ".u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));
  return v;
}
__device__ __forceinline__ unsigned short ld_nc_stream(const unsigned short* p) {
  unsigned short v;
  asm(LAGKV_LD_NC ".u16 %0, [%1];" : "=h"(v) : "l"(__cvta_generic_to_global(p)));
  return v;
}
__device__ __forceinline__ unsigned char ld_nc_stream(const unsigned char* p) { return __ldg(p); }
#undef LAGKV_LD_NC

}  // namespace detail

// Every access is of 1, 2, 4, 8 or 16 bytes and the address must be a multiple of that size.

/// Coherent load: sees what this block wrote before a barrier.
template <class T>
__device__ __forceinline__ T ld_global(const T* p) {
  const detail::WordOf<T> bits = *detail::word(p);
  return detail::bit_cast<T>(bits);
}

/// Load through the read-only path. The bytes must not be written by anyone during the kernel.
template <class T>
__device__ __forceinline__ T ld_global_nc(const T* p) {
  return detail::bit_cast<T>(__ldg(detail::word(p)));
}

/// As ld_global_nc for data that stream past once: no L1 allocation, 128-byte L2 fetches.
template <class T>
__device__ __forceinline__ T ld_global_nc_stream(const T* p) {
  return detail::bit_cast<T>(detail::ld_nc_stream(detail::word(p)));
}

template <class T>
__device__ __forceinline__ void st_global(T* p, const typename detail::Identity<T>::type& v) {
  *detail::word(p) = detail::bit_cast<detail::WordOf<T>, T>(v);
}

template <class T>
__device__ __forceinline__ T ld_shared(const T* p) {
  const detail::WordOf<T> bits = *detail::word(p);
  return detail::bit_cast<T>(bits);
}

template <class T>
__device__ __forceinline__ void st_shared(T* p, const typename detail::Identity<T>::type& v) {
  *detail::word(p) = detail::bit_cast<detail::WordOf<T>, T>(v);
}

#endif

}  // namespace lagkv
