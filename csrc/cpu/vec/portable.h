// Operations that differ between instruction sets, for any machine: 16-byte vectors, which the compiler maps
// to the baseline (SSE2, NEON) or to scalar code. On x86-64, SSE2 provides operations that GCC's vector
// extensions lack.

namespace lagkv::cpu::LAGKV_ISA {

/// Interleaves lanes of a and b, of their lower (0) or upper (1) halves.
template <int kUpper, size_t... kLane>
inline Int16Reg interleave(Int16Reg a, Int16Reg b, std::index_sequence<kLane...>) {
  constexpr int width = kWidth<int16_t>;
  return __builtin_shuffle(
      a, b, Int16Reg{static_cast<int16_t>(kLane / 2 + kUpper * width / 2 + kLane % 2 * width)...});
}

typedef uint16_t HalfBits __attribute__((vector_size(LAGKV_VECTOR_BYTES / 2)));
typedef uint32_t WordBits LAGKV_VECTOR;

inline FloatReg load(const BFloat16* p) {
  return (FloatReg)(__builtin_convertvector(load_raw<HalfBits>(p), WordBits) << 16);
}
constexpr bool kHalfPairs = true;

/// Converts eight float16, in order, to two vectors of float32, by 16-bit halves: sign and exponent with the
/// upper mantissa bits, and the lower mantissa bits. 2^112 moves float16's exponent range into float32's;
/// infinity and NaN get the exponent set by hand.
inline void convert_halves(Int16Reg bits, FloatReg& first, FloatReg& second) {
  const Int16Reg sign = bits & -0x8000, magnitude = bits & 0x7fff;
  const Int16Reg upper = (magnitude >> 3) | sign, lower = magnitude << 13;
  const Int16Reg special = (magnitude > 0x7bff) & 0x7f80, zero = {};
  constexpr auto lanes = std::make_index_sequence<kWidth<int16_t>>();
  first = (FloatReg)interleave<0>(lower, upper, lanes) * 0x1p112f;
  second = (FloatReg)interleave<1>(lower, upper, lanes) * 0x1p112f;
  first = (FloatReg)((Int32Reg)first | (Int32Reg)interleave<0>(zero, special, lanes));
  second = (FloatReg)((Int32Reg)second | (Int32Reg)interleave<1>(zero, special, lanes));
}
inline FloatReg load(const Half* p) {
  FloatReg first, second;
  Int16Reg bits = {};
  __builtin_memcpy(&bits, p, sizeof bits / 2);
  convert_halves(bits, first, second);
  return first;
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
// Extremes of 16-bit integers, read as signed or as unsigned; SSE2 has a saturating difference for the
// latter.
inline Int16Reg max_signed(Int16Reg a, Int16Reg b) { return (Int16Reg)_mm_max_epi16((__m128i)a, (__m128i)b); }
inline Int16Reg max_unsigned(Int16Reg a, Int16Reg b) {
  return (Int16Reg)_mm_subs_epu16((__m128i)a, (__m128i)b) + b;
}
inline Int16Reg min_unsigned(Int16Reg a, Int16Reg b) {
  return a - (Int16Reg)_mm_subs_epu16((__m128i)a, (__m128i)b);
}
inline unsigned sign_bits(Int32Reg x) { return static_cast<unsigned>(_mm_movemask_ps((__m128)x)); }
inline unsigned sign_bits(Int64Reg x) { return static_cast<unsigned>(_mm_movemask_pd((__m128d)x)); }
inline void stream_raw(void* p, Int32Reg x) { _mm_stream_si128((__m128i*)p, (__m128i)x); }
inline void fence() { _mm_sfence(); }
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
typedef uint16_t UInt16Reg LAGKV_VECTOR;
inline Int16Reg max_signed(Int16Reg a, Int16Reg b) { return a > b ? a : b; }
inline Int16Reg max_unsigned(Int16Reg a, Int16Reg b) { return (UInt16Reg)a > (UInt16Reg)b ? a : b; }
inline Int16Reg min_unsigned(Int16Reg a, Int16Reg b) { return (UInt16Reg)a < (UInt16Reg)b ? a : b; }
template <class IntReg>
inline unsigned sign_bits(IntReg x) {
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); ++i) bits |= (x[i] < 0 ? 1u : 0u) << i;
  return bits;
}
inline void stream_raw(void* p, Int32Reg x) { store_raw(p, x); }
inline void fence() {}
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
