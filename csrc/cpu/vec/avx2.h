// Operations that differ between instruction sets, for AVX2 with FMA and F16C.

namespace lagkv::cpu::LAGKV_ISA {

constexpr bool kHalfPairs = false;  // float16 converts in one instruction

inline FloatReg load(const BFloat16* p) {
  return (FloatReg)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline FloatReg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

/// The first `count` < W elements, then zeros; reads nothing past them.
inline FloatReg load_part(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, (__m256i)first_lanes<float>(count));
}
inline DoubleReg load_part(const double* p, int64_t count) {
  return _mm256_maskload_pd(p, (__m256i)first_lanes<double>(count));
}
template <class T>
inline FloatReg load_part(const T* p, int64_t count) {
  T part[kWidth<float>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
inline Int16Reg load_part_bits(const void* p, int64_t count) {
  int16_t part[kWidth<int16_t>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = static_cast<const int16_t*>(p)[i];
  return load_raw<Int16Reg>(part);
}

inline FloatReg min(FloatReg a, FloatReg b) { return _mm256_min_ps(a, b); }
inline FloatReg max(FloatReg a, FloatReg b) { return _mm256_max_ps(a, b); }
inline DoubleReg min(DoubleReg a, DoubleReg b) { return _mm256_min_pd(a, b); }
inline DoubleReg max(DoubleReg a, DoubleReg b) { return _mm256_max_pd(a, b); }
inline FloatReg sqrt(FloatReg a) { return _mm256_sqrt_ps(a); }
inline DoubleReg sqrt(DoubleReg a) { return _mm256_sqrt_pd(a); }

/// Extremes of 16-bit integers, read as signed or as unsigned.
inline Int16Reg max_signed(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm256_max_epi16((__m256i)a, (__m256i)b);
}
inline Int16Reg max_unsigned(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm256_max_epu16((__m256i)a, (__m256i)b);
}
inline Int16Reg min_unsigned(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm256_min_epu16((__m256i)a, (__m256i)b);
}

/// a b + c, a b - c, c - a b.
inline FloatReg fma(FloatReg a, FloatReg b, FloatReg c) { return _mm256_fmadd_ps(a, b, c); }
inline FloatReg fms(FloatReg a, FloatReg b, FloatReg c) { return _mm256_fmsub_ps(a, b, c); }
inline FloatReg fnma(FloatReg a, FloatReg b, FloatReg c) { return _mm256_fnmadd_ps(a, b, c); }
inline DoubleReg fma(DoubleReg a, DoubleReg b, DoubleReg c) { return _mm256_fmadd_pd(a, b, c); }
inline DoubleReg fms(DoubleReg a, DoubleReg b, DoubleReg c) { return _mm256_fmsub_pd(a, b, c); }
inline DoubleReg fnma(DoubleReg a, DoubleReg b, DoubleReg c) { return _mm256_fnmadd_pd(a, b, c); }

/// Accumulates whether any lane of a or b was NaN.
struct NanFlag {
  FloatReg bits = {};
  void see(FloatReg a, FloatReg b) { bits = _mm256_or_ps(bits, _mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
  void see(DoubleReg a, DoubleReg b) {
    bits = _mm256_or_ps(bits, (FloatReg)_mm256_cmp_pd(a, b, _CMP_UNORD_Q));
  }
  bool any() const { return _mm256_movemask_ps(bits) != 0; }
};

/// Bit i tells whether lane i of the W integers at p exceeds the bound.
inline uint64_t greater_bits(const int32_t* p, int32_t bound) {
  const Int32Reg greater = load_raw<Int32Reg>(p) > bound;
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)greater));
}
inline uint64_t greater_bits(const int64_t* p, int64_t bound) {
  const Int64Reg greater = load_raw<Int64Reg>(p) > bound;
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)greater));
}

inline void stream_raw(void* p, Int32Reg x) { _mm256_stream_si256((__m256i*)p, (__m256i)x); }
inline void fence() { _mm_sfence(); }

}  // namespace lagkv::cpu::LAGKV_ISA
