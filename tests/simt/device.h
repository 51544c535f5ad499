// CUDA's names for device code, on the host: simt.cuh includes this instead of leaving them to nvcc. Nothing
// here has a behaviour of its own: what threads do to each other goes to the executor (runtime.h), arithmetic
// to the host's.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define __builtin_assume(condition) static_cast<void>(0)

#define threadIdx (::simt::self->thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_dim)
#define gridDim (::simt::grid_dim)
constexpr int warpSize = 32;

// Receiver of calls of the names below. One pointer, made at compile time.
#define SIMT_HERE ::simt::Site site = ::simt::Site::current()

#define LAGKV_SITE_PARAM , SIMT_HERE
#define LAGKV_SITE_ARG , site

#define LAGKV_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::simt::dynamic_shared(::simt::Site::current()))
#define LAGKV_SHARED(type, name, count)                                    \
  static char name##_identity;                                             \
  type(&name)[count] = *static_cast<type(*)[count]>(::simt::static_shared( \
      &name##_identity, #name, sizeof(type) * (count), alignof(type), ::simt::Site::current()))

// ---- Memory ----

namespace lagkv {
namespace detail {

template <class T>
T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <class T>
constexpr void check_access() {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0,
                "an access is of 1, 2, 4, 8 or 16 bytes");
}

}  // namespace detail

template <class T>
T ld_global(const T* p, SIMT_HERE) {
  detail::check_access<T>();
  return detail::load<T>(::simt::global_access(p, sizeof(T), ::simt::Access::kRead, site));
}
template <class T>
T ld_global_nc(const T* p, SIMT_HERE) {
  detail::check_access<T>();
  return detail::load<T>(::simt::global_access(p, sizeof(T), ::simt::Access::kReadNc, site));
}
template <class T>
T ld_global_nc_stream(const T* p, SIMT_HERE) {
  return ld_global_nc(p, site);
}
template <class T>
void st_global(T* p, const std::type_identity_t<T>& v, SIMT_HERE) {
  detail::check_access<T>();
  std::memcpy(::simt::global_access(p, sizeof(T), ::simt::Access::kWrite, site), &v, sizeof(T));
}
template <class T>
T ld_shared(const T* p, SIMT_HERE) {
  detail::check_access<T>();
  return detail::load<T>(::simt::shared_access(p, sizeof(T), ::simt::Access::kRead, site));
}
template <class T>
void st_shared(T* p, const std::type_identity_t<T>& v, SIMT_HERE) {
  detail::check_access<T>();
  std::memcpy(::simt::shared_access(p, sizeof(T), ::simt::Access::kWrite, site), &v, sizeof(T));
}
}  // namespace lagkv

// ---- Threads that wait for each other ----

inline void __syncthreads(SIMT_HERE) { ::simt::block_barrier(::simt::BlockVote::kNone, 0, site); }
inline int __syncthreads_count(int p, SIMT_HERE) {
  return ::simt::block_barrier(::simt::BlockVote::kCount, p, site);
}
inline int __syncthreads_and(int p, SIMT_HERE) {
  return ::simt::block_barrier(::simt::BlockVote::kAnd, p, site);
}
inline int __syncthreads_or(int p, SIMT_HERE) {
  return ::simt::block_barrier(::simt::BlockVote::kOr, p, site);
}
// Fences order nothing by themselves, and the executor runs one thread at a time.
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(SIMT_HERE) { ::simt::trap(site); }

namespace simt {

/// The types CUDA has warp shuffles for. Smaller ones would be promoted there.
template <class T>
constexpr bool can_shuffle =
    (std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8)) || std::is_same_v<T, __half> ||
    std::is_same_v<T, __half2> || std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __nv_bfloat162>;

template <class T>
T shuffle(Collective what, unsigned mask, T value, uint32_t operand, int width, const Site& site) {
  static_assert(can_shuffle<T>, "CUDA shuffles 4- and 8-byte numbers, half and bfloat16");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(what, mask, bits, sizeof(T), operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint64_t vote(Collective what, unsigned mask, uint64_t value, const Site& site) {
  return collective(what, mask, value, 4, 0, 32, site);
}

template <class T>
uint64_t match_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA matches 4- and 8-byte numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace simt

inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  ::simt::vote(::simt::Collective::kBarrier, mask, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_HERE) {
  return ::simt::shuffle(::simt::Collective::kShuffle, mask, v, static_cast<uint32_t>(lane), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_HERE) {
  return ::simt::shuffle(::simt::Collective::kShuffleUp, mask, v, delta, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_HERE) {
  return ::simt::shuffle(::simt::Collective::kShuffleDown, mask, v, delta, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_HERE) {
  return ::simt::shuffle(::simt::Collective::kShuffleXor, mask, v, static_cast<uint32_t>(lanes), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) {
  return static_cast<unsigned>(::simt::vote(::simt::Collective::kBallot, mask, p != 0, site));
}
inline int __any_sync(unsigned mask, int p, SIMT_HERE) {
  return static_cast<int>(::simt::vote(::simt::Collective::kAny, mask, p != 0, site));
}
inline int __all_sync(unsigned mask, int p, SIMT_HERE) {
  return static_cast<int>(::simt::vote(::simt::Collective::kAll, mask, p != 0, site));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v, SIMT_HERE) {
  return static_cast<unsigned>(
      ::simt::vote(::simt::Collective::kMatchAny, mask, ::simt::match_bits(v), site));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T v, int* all, SIMT_HERE) {
  const auto same =
      static_cast<unsigned>(::simt::vote(::simt::Collective::kMatchAll, mask, ::simt::match_bits(v), site));
  *all = same != 0;
  return same;
}

#define SIMT_REDUCE(name, type, what)                                                                       \
  inline type name(unsigned mask, type v, SIMT_HERE) {                                                      \
    return static_cast<type>(::simt::vote(::simt::Collective::what, mask, static_cast<unsigned>(v), site)); \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, kReduceAdd)
SIMT_REDUCE(__reduce_add_sync, int, kReduceAdd)
SIMT_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
SIMT_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
SIMT_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
SIMT_REDUCE(__reduce_min_sync, unsigned, kReduceMin)
SIMT_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
SIMT_REDUCE(__reduce_max_sync, unsigned, kReduceMax)
SIMT_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
#undef SIMT_REDUCE

// ---- Atomics, on global and shared memory ----

#define SIMT_ATOMIC(name, condition, expression)                                                \
  template <class T>                                                                            \
  T name(T* p, std::type_identity_t<T> v, SIMT_HERE) {                                          \
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8) && (condition), \
                  #name " has no such type in CUDA");                                           \
    void* const place = ::simt::atomic_access(p, sizeof(T), site);                              \
    T old;                                                                                      \
    std::memcpy(&old, place, sizeof(T));                                                        \
    const T now = (expression);                                                                 \
    std::memcpy(place, &now, sizeof(T));                                                        \
    return old;                                                                                 \
  }
#define SIMT_NOT_INT64 (!std::is_integral_v<T> || sizeof(T) == 4 || std::is_unsigned_v<T>)
SIMT_ATOMIC(atomicAdd, SIMT_NOT_INT64, static_cast<T>(old + v))
SIMT_ATOMIC(atomicSub, std::is_integral_v<T> && sizeof(T) == 4, static_cast<T>(old - v))
SIMT_ATOMIC(atomicMin, std::is_integral_v<T>, v < old ? v : old)
SIMT_ATOMIC(atomicMax, std::is_integral_v<T>, v > old ? v : old)
SIMT_ATOMIC(atomicAnd, std::is_integral_v<T>, old& v)
SIMT_ATOMIC(atomicOr, std::is_integral_v<T>, old | v)
SIMT_ATOMIC(atomicXor, std::is_integral_v<T>, old ^ v)
SIMT_ATOMIC(atomicExch, SIMT_NOT_INT64, v)
#undef SIMT_NOT_INT64
#undef SIMT_ATOMIC

template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v, SIMT_HERE) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "atomicCAS has no such type here");
  void* const place = ::simt::atomic_access(p, sizeof(T), site);
  T old;
  std::memcpy(&old, place, sizeof(T));
  if (old == compare) std::memcpy(place, &v, sizeof(T));
  return old;
}

// ---- Arithmetic ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// Macros, because some versions of the C library declare functions of these names. The device's fast
// approximations are exact here: nothing may depend on their errors.
#define rsqrtf(x) (1.0f / ::sqrtf(x))
#define rsqrt(x) (1.0 / ::sqrt(x))
#define __expf(x) (::expf(x))
#define __logf(x) (::logf(x))

// As CUDA's: of two floating-point numbers of which one is NaN, the other one.
template <class A, class B>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return std::fmin(x, y);
  return y < x ? y : x;
}
template <class A, class B>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return std::fmax(x, y);
  return x < y ? y : x;
}
