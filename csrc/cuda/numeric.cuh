// Numbers: storage types to arithmetic types, NaN-propagating minimum and maximum, and the order of scores
// as integers.
#pragma once

#include <cmath>
#include <type_traits>

#include "simt.cuh"

namespace lagkv::cuda {

/// Arithmetic is float32 whatever the storage type; float64 inputs compute in float64. `Bits` holds an
/// ordered Real.
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

template <class Real>
struct Order {
  using Bits = uint32_t;
};
template <>
struct Order<double> {
  using Bits = uint64_t;
};
template <class T>
using BitsOf = typename Order<RealOf<T>>::Bits;

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
/// The larger one; a NaN loses against a number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// Minimum and maximum in which a NaN wins: bounds of a channel with a NaN are NaN. fminf and fmaxf would
// drop it.
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
__device__ __forceinline__ __half2 min_nan(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ __half2 max_nan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 min_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmin2_nan(a, b);
}
__device__ __forceinline__ __nv_bfloat162 max_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmax2_nan(a, b);
}

/// N neighbouring elements as one access and as machine words. Not as elements: the compiler would give
/// every 16-bit element a register of its own.
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
  const Vec<T, N> all = bits_as<Vec<T, N>>(packed);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_real(all[i]);
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

/// Scores as unsigned integers in the order of the selection: NaN is highest, -0 equals +0. 0 is no score's
/// value.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 0xFFFFFFFFu;
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // -0 + 0 = +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered(double x) {
  if (x != x) return ~uint64_t{0};
  const uint64_t bits = bits_as<uint64_t>(x + 0.0);
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return bits & kSign ? ~bits : bits | kSign;
}

}  // namespace lagkv::cuda
