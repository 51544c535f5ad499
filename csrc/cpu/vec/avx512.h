// Operations that differ between instruction sets, for AVX-512 (F, BW, DQ, VL).

namespace lagkv::cpu::LAGKV_ISA {

constexpr bool kHalfPairs = false;  // float16 converts in one instruction

inline FloatReg load(const BFloat16* p) {
  return (FloatReg)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline FloatReg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

/// The first `count` < W elements, then zeros; reads nothing past them.
inline FloatReg load_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline DoubleReg load_part(const double* p, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
}
inline FloatReg load_part(const BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return (FloatReg)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline FloatReg load_part(const Half* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
}
inline Int16Reg load_part_bits(const void* p, int64_t count) {
  return (Int16Reg)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p);
}

inline FloatReg min(FloatReg a, FloatReg b) { return _mm512_min_ps(a, b); }
inline FloatReg max(FloatReg a, FloatReg b) { return _mm512_max_ps(a, b); }
inline DoubleReg min(DoubleReg a, DoubleReg b) { return _mm512_min_pd(a, b); }
inline DoubleReg max(DoubleReg a, DoubleReg b) { return _mm512_max_pd(a, b); }
inline FloatReg sqrt(FloatReg a) { return _mm512_sqrt_ps(a); }
inline DoubleReg sqrt(DoubleReg a) { return _mm512_sqrt_pd(a); }

/// Extremes of 16-bit integers, read as signed or as unsigned.
inline Int16Reg max_signed(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm512_max_epi16((__m512i)a, (__m512i)b);
}
inline Int16Reg max_unsigned(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm512_max_epu16((__m512i)a, (__m512i)b);
}
inline Int16Reg min_unsigned(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm512_min_epu16((__m512i)a, (__m512i)b);
}

/// a b + c, a b - c, c - a b.
inline FloatReg fma(FloatReg a, FloatReg b, FloatReg c) { return _mm512_fmadd_ps(a, b, c); }
inline FloatReg fms(FloatReg a, FloatReg b, FloatReg c) { return _mm512_fmsub_ps(a, b, c); }
inline FloatReg fnma(FloatReg a, FloatReg b, FloatReg c) { return _mm512_fnmadd_ps(a, b, c); }
inline DoubleReg fma(DoubleReg a, DoubleReg b, DoubleReg c) { return _mm512_fmadd_pd(a, b, c); }
inline DoubleReg fms(DoubleReg a, DoubleReg b, DoubleReg c) { return _mm512_fmsub_pd(a, b, c); }
inline DoubleReg fnma(DoubleReg a, DoubleReg b, DoubleReg c) { return _mm512_fnmadd_pd(a, b, c); }

/// Accumulates whether any lane of a or b was NaN.
struct NanFlag {
  unsigned bits = 0;
  void see(FloatReg a, FloatReg b) { bits |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  void see(DoubleReg a, DoubleReg b) { bits |= _mm512_cmp_pd_mask(a, b, _CMP_UNORD_Q); }
  bool any() const { return bits != 0; }
};

/// Bit i tells whether lane i of the W integers at p exceeds the bound.
inline uint64_t greater_bits(const int32_t* p, int32_t bound) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(bound));
}
inline uint64_t greater_bits(const int64_t* p, int64_t bound) {
  return _mm512_cmpgt_epi64_mask(_mm512_loadu_si512(p), _mm512_set1_epi64(bound));
}

/// Number of integers above the bound among `count` padded to whole vectors.
template <class Int>
inline int64_t count_greater(const Int* keys, int64_t count, Int bound) {
  int64_t greater = 0;
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += LAGKV_VECTOR_BYTES / static_cast<int>(sizeof(Int))) {
    greater += __builtin_popcountll(greater_bits(keys + i, bound));
  }
  return greater;
}

inline void stream_raw(void* p, Int32Reg x) { _mm512_stream_si512((__m512i*)p, (__m512i)x); }
inline void fence() { _mm_sfence(); }

}  // namespace lagkv::cpu::LAGKV_ISA
