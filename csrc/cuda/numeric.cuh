// Scalars: storage types and the arithmetic's types, NaN-propagating minimum and maximum, values as bits.
#pragma once

#include <cmath>
#include <type_traits>

#include "simt.cuh"

namespace lagkv::cuda {

/// Arithmetic is float32 whatever the storage type; float64 inputs compute in float64.
template <class T>
struct Arithmetic {
  using Real = float;
};
template <>
struct Arithmetic<double> {
  using Real = double;
};
template <class T>
using RealOf = typename Arithmetic<T>::Real;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

__device__ __forceinline__ float to_real(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ double to_real(double x) { return x; }

/// +infinity (sign = 0) or -infinity (sign = 1) as stored.
template <class T>
__device__ __forceinline__ T infinity(int sign);
template <>
__device__ __forceinline__ __half infinity<__half>(int sign) {
  return bits_as<__half>(static_cast<uint16_t>(sign ? 0xFC00 : 0x7C00));
}
template <>
__device__ __forceinline__ __nv_bfloat16 infinity<__nv_bfloat16>(int sign) {
  return bits_as<__nv_bfloat16>(static_cast<uint16_t>(sign ? 0xFF80 : 0x7F80));
}
template <>
__device__ __forceinline__ float infinity<float>(int sign) {
  return bits_as<float>(sign ? 0xFF800000u : 0x7F800000u);
}
template <>
__device__ __forceinline__ double infinity<double>(int sign) {
  return bits_as<double>(sign ? uint64_t{0xFFF0000000000000} : uint64_t{0x7FF0000000000000});
}

template <class Real>
__device__ __forceinline__ Real not_a_number() {
  return infinity<Real>(0) - infinity<Real>(0);
}

/// False for NaN and both infinities.
template <class Real>
__device__ __forceinline__ bool is_finite(Real x) {
  return x - x == Real(0);
}

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
/// a b + c, rounded once.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
/// The larger one; a NaN loses against a number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// Minimum and maximum in which a NaN wins: bounds of a channel with a NaN are NaN. fminf and fmaxf would drop
// it.
__device__ __forceinline__ __half min_nan(__half a, __half b) { return __hmin_nan(a, b); }
__device__ __forceinline__ __half max_nan(__half a, __half b) { return __hmax_nan(a, b); }
__device__ __forceinline__ __nv_bfloat16 min_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __hmin_nan(a, b);
}
__device__ __forceinline__ __nv_bfloat16 max_nan(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __hmax_nan(a, b);
}
__device__ __forceinline__ double min_nan(double a, double b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ double max_nan(double a, double b) { return a > b || a != a ? a : b; }
#if defined(LAGKV_SIMT)
__device__ __forceinline__ float min_nan(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float max_nan(float a, float b) { return a > b || a != a ? a : b; }
#else
__device__ __forceinline__ float min_nan(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}
#endif
// Two channels of a 16-bit type in one instruction.
__device__ __forceinline__ __half2 min_nan(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ __half2 max_nan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 min_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmin2_nan(a, b);
}
__device__ __forceinline__ __nv_bfloat162 max_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmax2_nan(a, b);
}

}  // namespace lagkv::cuda
