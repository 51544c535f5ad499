// Storage types of the CPU kernels and their exact scalar conversions. No torch, no vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace lagkv::cpu {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

/// The type that arithmetic runs in: float64 for float64, float32 for all else.
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

template <class T>
constexpr bool kIs16Bit = false;
template <>
constexpr bool kIs16Bit<Half> = true;
template <>
constexpr bool kIs16Bit<BFloat16> = true;

template <class T>
constexpr int16_t kInfinityBits = 0;
template <>
constexpr int16_t kInfinityBits<Half> = 0x7c00;
template <>
constexpr int16_t kInfinityBits<BFloat16> = 0x7f80;

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_real(float x) { return x; }
inline double to_real(double x) { return x; }
inline float to_real(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_real(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // 2^112 moves float16's exponent range into float32's; denormals come out normalised by the product.
  if (magnitude < 0x0f800000u) return bits_to_float(sign | magnitude) * 0x1p112f;
  return bits_to_float(sign | magnitude | 0x7f800000u);
}

}  // namespace lagkv::cpu
