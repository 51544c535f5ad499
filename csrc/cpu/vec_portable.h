// What differs between instruction sets, for any machine: 16-byte vectors, which the compiler maps to the
// baseline (SSE2, NEON) or to scalar code. Where SSE2 is there by definition, three operations the extensions
// lack come from it.

namespace lagkv::cpu::LAGKV_ISA {

typedef uint16_t HalfBits __attribute__((vector_size(LAGKV_VECTOR_BYTES / 2)));
typedef uint32_t WordBits LAGKV_VECTOR;

inline FloatReg load(const BFloat16* p) {
  return (FloatReg)(__builtin_convertvector(load_raw<HalfBits>(p), WordBits) << 16);
}
inline FloatReg load(const Half* p) {
  const WordBits bits = __builtin_convertvector(load_raw<HalfBits>(p), WordBits);
  const WordBits magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  // 2^112 moves float16's exponent range into float32's; infinity and NaN get the exponent set by hand.
  const WordBits finite = (WordBits)((FloatReg)magnitude * 0x1p112f);
  const WordBits special = (WordBits)((Int32Reg)magnitude > 0x0f7fffff) & 0x7f800000u;
  return (FloatReg)(finite | special | sign);
}

/// The first `count` < W elements, then zeros; reads nothing past them.
template <class T>
inline RegOf<RealOf<T>> load_part(const T* p, int64_t count) {
  T part[kWidth<RealOf<T>>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
inline Int16Reg load_part_bits(const void* p, int64_t count) {
  int16_t part[kWidth<int16_t>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = static_cast<const int16_t*>(p)[i];
  return load_raw<Int16Reg>(part);
}

#if defined(__SSE2__)
inline FloatReg min(FloatReg a, FloatReg b) { return _mm_min_ps(a, b); }
inline FloatReg max(FloatReg a, FloatReg b) { return _mm_max_ps(a, b); }
inline DoubleReg min(DoubleReg a, DoubleReg b) { return _mm_min_pd(a, b); }
inline DoubleReg max(DoubleReg a, DoubleReg b) { return _mm_max_pd(a, b); }
inline FloatReg sqrt(FloatReg a) { return _mm_sqrt_ps(a); }
inline DoubleReg sqrt(DoubleReg a) { return _mm_sqrt_pd(a); }
inline unsigned sign_bits(Int32Reg x) { return static_cast<unsigned>(_mm_movemask_ps((__m128)x)); }
inline unsigned sign_bits(Int64Reg x) { return static_cast<unsigned>(_mm_movemask_pd((__m128d)x)); }
inline void stream_raw(void* p, Int32Reg x) { _mm_stream_si128((__m128i*)p, (__m128i)x); }
#else
template <class Reg>
inline Reg min(Reg a, Reg b) {
  return min_generic(a, b);
}
template <class Reg>
inline Reg max(Reg a, Reg b) {
  return max_generic(a, b);
}
inline FloatReg sqrt(FloatReg a) {
  for (int i = 0; i < kWidth<float>; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline DoubleReg sqrt(DoubleReg a) {
  for (int i = 0; i < kWidth<double>; ++i) a[i] = __builtin_sqrt(a[i]);
  return a;
}
template <class IntReg>
inline unsigned sign_bits(IntReg x) {
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); ++i) bits |= (x[i] < 0 ? 1u : 0u) << i;
  return bits;
}
inline void stream_raw(void* p, Int32Reg x) { store_raw(p, x); }
#endif

/// a b + c, a b - c, c - a b.
template <class Reg>
inline Reg fma(Reg a, Reg b, Reg c) {
  return a * b + c;
}
template <class Reg>
inline Reg fms(Reg a, Reg b, Reg c) {
  return a * b - c;
}
template <class Reg>
inline Reg fnma(Reg a, Reg b, Reg c) {
  return c - a * b;
}

/// Accumulates whether any lane of a or b was NaN.
struct NanFlag {
  Int32Reg bits = {};
  template <class Reg>
  void see(Reg a, Reg b) {
    bits |= (Int32Reg)(a != a) | (Int32Reg)(b != b);
  }
  bool any() const { return sign_bits(bits) != 0; }
};

/// Bit i tells whether lane i of the W integers at p exceeds the bound.
inline uint64_t greater_bits(const int32_t* p, int32_t bound) {
  const Int32Reg greater = load_raw<Int32Reg>(p) > bound;
  return sign_bits(greater);
}
inline uint64_t greater_bits(const int64_t* p, int64_t bound) {
  const Int64Reg greater = load_raw<Int64Reg>(p) > bound;
  return sign_bits(greater);
}

}  // namespace lagkv::cpu::LAGKV_ISA
