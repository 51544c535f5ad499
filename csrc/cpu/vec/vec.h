// Vector types and operations that are the same on every instruction set, by GCC's vector extensions: + - * /
// and comparisons are written plainly. Included once by each source in kernels/, after LAGKV_ISA (the
// namespace) and LAGKV_VECTOR_BYTES are defined; what differs follows in the file of the instruction set.
//
// Code in this namespace must not instantiate functions of the standard library: the linker keeps one copy of
// such a function, and it could be the one compiled for the wider machine.

namespace lagkv::cpu::LAGKV_ISA {

#define LAGKV_VECTOR __attribute__((vector_size(LAGKV_VECTOR_BYTES)))
typedef float FloatReg LAGKV_VECTOR;
typedef double DoubleReg LAGKV_VECTOR;
typedef int16_t Int16Reg LAGKV_VECTOR;
typedef int32_t Int32Reg LAGKV_VECTOR;
typedef int64_t Int64Reg LAGKV_VECTOR;

template <class Real>
struct LanesOf;
template <>
struct LanesOf<float> {
  using Reg = FloatReg;
  using Int = int32_t;
  using IntReg = Int32Reg;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct LanesOf<double> {
  using Reg = DoubleReg;
  using Int = int64_t;
  using IntReg = Int64Reg;
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <class Real>
using RegOf = typename LanesOf<Real>::Reg;
template <class Real>
constexpr int kWidth = LAGKV_VECTOR_BYTES / sizeof(Real);
template <class Real>
constexpr int kLevels = __builtin_ctz(kWidth<Real>);

template <class Reg>
inline Reg load_raw(const void* p) {
  Reg x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class Reg>
inline void store_raw(void* p, Reg x) {
  __builtin_memcpy(p, &x, sizeof x);
}

inline FloatReg load(const float* p) { return load_raw<FloatReg>(p); }
inline DoubleReg load(const double* p) { return load_raw<DoubleReg>(p); }
typedef float HalfFloatReg __attribute__((vector_size(LAGKV_VECTOR_BYTES / 2)));
inline DoubleReg load_double(const float* p) {
  return __builtin_convertvector(load_raw<HalfFloatReg>(p), DoubleReg);
}
inline DoubleReg load_double(const double* p) { return load(p); }
inline void store(float* p, FloatReg x) { store_raw(p, x); }
inline void store(double* p, DoubleReg x) { store_raw(p, x); }

template <class Real>
inline RegOf<Real> set1(Real x) {
  return x - RegOf<Real>{};
}

/// Minimum and maximum return the second operand where either is NaN, as x86's instructions do.
template <class Reg>
inline Reg min_generic(Reg a, Reg b) {
  return a < b ? a : b;
}
template <class Reg>
inline Reg max_generic(Reg a, Reg b) {
  return a > b ? a : b;
}

/// The lane of a (0 .. W-1) or b (W .. 2W-1) that lane `lane` of pair<level> takes.
///
/// Folding W vectors of W partial results, one vector a row, into one vector with a result per lane goes in
/// log2(W) levels; each puts one half of every row's partial results beside the other half. The first levels
/// move 128-bit blocks, the last ones stay inside a block: both are single instructions.
template <class Real>
constexpr int pair_lane(int level, bool high, int lane) {
  constexpr int width = kWidth<Real>, block = 16 / sizeof(Real), blocks = width / block;
  const int block_levels = __builtin_ctz(blocks), within = lane % block, out_block = lane / block;
  if (level < block_levels) {
    const int per_row = blocks >> level, half = per_row / 2, rows = 1 << level;
    const int row = out_block / half;
    const int source = row % rows * per_row + out_block % half + (high ? half : 0);
    return (row < rows ? 0 : width) + source * block + within;
  }
  const int per_row = block >> (level - block_levels), half = per_row / 2;  // of a block
  const int entry = within % (block / 2);
  const int source = entry / half * per_row + entry % half + (high ? half : 0);
  return (within < block / 2 ? 0 : width) + out_block * block + source;
}

/// The place of row i among W vectors, so that fold_sum leaves its result in lane i. For i a multiple of 4,
/// fold_order(i + j) is fold_order(i) + fold_order(j).
template <class Real>
constexpr int64_t fold_order(int64_t row) {
  constexpr int block = 16 / sizeof(Real), blocks = kWidth<Real> / block;
  return row / block + row % block * blocks;
}

template <class Real, int kLevel, bool kHigh, size_t... kLane>
inline RegOf<Real> pair_half(RegOf<Real> a, RegOf<Real> b, std::index_sequence<kLane...>) {
  using IntReg = typename LanesOf<Real>::IntReg;
  return __builtin_shuffle(a, b, IntReg{pair_lane<Real>(kLevel, kHigh, static_cast<int>(kLane))...});
}

template <class Real, int kLevel>
inline void pair(RegOf<Real> a, RegOf<Real> b, RegOf<Real>& low, RegOf<Real>& high) {
  constexpr auto lanes = std::make_index_sequence<kWidth<Real>>();
  low = pair_half<Real, kLevel, false>(a, b, lanes);
  high = pair_half<Real, kLevel, true>(a, b, lanes);
}

/// Sums each row's partial results: `rows` holds row i at fold_order(i), the result has its sum in lane i.
template <class Real, int kLevel = 0>
inline RegOf<Real> fold_sum(RegOf<Real>* rows) {
  if constexpr (kLevel == kLevels<Real>) {
    return rows[0];
  } else {
#pragma GCC unroll 8
    for (int k = 0; k < (kWidth<Real> >> (kLevel + 1)); ++k) {
      RegOf<Real> low, high;
      pair<Real, kLevel>(rows[2 * k], rows[2 * k + 1], low, high);
      rows[k] = low + high;
    }
    return fold_sum<Real, kLevel + 1>(rows);
  }
}

template <class Real, int kBy, class Reg, size_t... kLane>
inline Reg rotate(Reg x, std::index_sequence<kLane...>) {
  using IntReg = typename LanesOf<Real>::IntReg;
  return __builtin_shuffle(x, IntReg{static_cast<int>((kLane + kBy) % kWidth<Real>)...});
}

/// Lane 0 of the result combines all lanes, by halves. Reg holds reals or the integers of their width.
template <class Real, class Reg, class Combine, int kBy = kWidth<Real> / 2>
inline auto reduce(Reg x, const Combine& combine) {
  if constexpr (kBy == 0) {
    return x[0];
  } else {
    constexpr auto lanes = std::make_index_sequence<kWidth<Real>>();
    return reduce<Real, Reg, Combine, kBy / 2>(combine(x, rotate<Real, kBy>(x, lanes)), combine);
  }
}

struct Add {
  template <class Reg>
  Reg operator()(Reg a, Reg b) const {
    return a + b;
  }
};
struct Greater {
  template <class Reg>
  Reg operator()(Reg a, Reg b) const {
    return a > b ? a : b;
  }
};
struct Less {
  template <class Reg>
  Reg operator()(Reg a, Reg b) const {
    return a < b ? a : b;
  }
};

template <class Real>
inline Real sum_lanes(RegOf<Real> x) {
  return reduce<Real>(x, Add());
}

/// True where a comparison holds in every lane.
template <class Real>
inline bool all_lanes(typename LanesOf<Real>::IntReg mask) {
  struct And {
    auto operator()(typename LanesOf<Real>::IntReg a, typename LanesOf<Real>::IntReg b) const {
      return a & b;
    }
  };
  return reduce<Real>(mask, And()) != 0;
}

#if LAGKV_VECTOR_BYTES < 64  // AVX-512 counts bits of masks
/// Number of integers above the bound among `count` padded to whole vectors.
template <class Int>
inline int64_t count_greater(const Int* keys, int64_t count, Int bound) {
  using Real = std::conditional_t<sizeof(Int) == 4, float, double>;
  using IntReg = typename LanesOf<Real>::IntReg;
  IntReg even = {}, odd = {};  // minus the count of each lane
  int64_t i = 0;
  for (; i + kWidth<Real> < count; i += 2 * kWidth<Real>) {
    even += load_raw<IntReg>(keys + i) > bound;
    odd += load_raw<IntReg>(keys + i + kWidth<Real>) > bound;
  }
  if (i < count) even += load_raw<IntReg>(keys + i) > bound;
  return -static_cast<int64_t>(reduce<Real>(even + odd, Add()));
}
#endif

/// All ones in the first `count` lanes.
template <class Real>
inline typename LanesOf<Real>::IntReg first_lanes(int64_t count) {
  using Int = typename LanesOf<Real>::Int;
  typename LanesOf<Real>::IntReg lane;
  for (int i = 0; i < kWidth<Real>; ++i) lane[i] = i;
  return lane < static_cast<Int>(count);
}

template <class Real>
inline RegOf<Real> keep_lanes(RegOf<Real> x, typename LanesOf<Real>::IntReg mask) {
  return (RegOf<Real>)((typename LanesOf<Real>::IntReg)x & mask);
}

/// Prefetches `count` rows from `first` on into the L2 cache.
inline void prefetch(const Upcoming& upcoming, int64_t first, int64_t count) {
  if (upcoming.rows == nullptr) return;
  __asm__ volatile("");  // else GCC 12 may find that this function has no effect and drop its calls
  for (int64_t t = first; t < first + count; ++t) {
    const char* row = upcoming.list == nullptr ? upcoming.rows + t * upcoming.row_stride
                                               : upcoming.list[t] + upcoming.list_offset;
    for (int64_t offset = 0; offset < upcoming.row_bytes; offset += 64)
      __builtin_prefetch(row + offset, 0, 2);
  }
}

}  // namespace lagkv::cpu::LAGKV_ISA
