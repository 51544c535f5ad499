// The paper's statistic: s[t] = std_c((x[t, c] - lo_c) / (hi_c - lo_c)), unbiased, against the bounds of the
// next partition.
//
// With d = y - 1/2 the squared deviation of a row is sum(d^2) - sum(d)^2 / D: one pass over the row, no
// horizontal step per row. y is 0 and 1 at the bounds, so that rows have their mean near 1/2 and the
// difference loses nothing; a row where it loses more than two bits, or whose result is not finite, is
// computed again as the reference does it, with sums in float64.
//
// d = scale x - offset, offset = scale lo - 1/2 in a single operation, where the offset is too small to cost
// digits; else d = scale (x - lo) - 1/2. The choice is made for each block of channels.

namespace lagkv::cpu::LAGKV_ISA {

constexpr int kMostLost = 3;  // sum(d)^2 / D over what is left; 1/8 for normal data

/// The bounds of a partition and what the statistic needs of them, in reference_size(dim) reals.
template <class Real>
struct StdReference {
  Real *lo, *hi, *scale, *offset;
  StdReference(Real* reference, int64_t dim)
      : lo(reference),
        hi(reference + padded(dim)),
        scale(reference + 2 * padded(dim)),
        offset(reference + 3 * padded(dim)) {}

  void set_scale(int64_t dim) const {
    using Reg = RegOf<Real>;
    const Reg one = set1<Real>(1), zero = {}, half = set1<Real>(0.5);
    // A quotient by more than this is denormal or nearly: NaN sends the rows to the exact path.
    const Reg most = set1<Real>(sizeof(Real) == 4 ? 1e37 : 1e307), nan = set1<Real>(__builtin_nan(""));
    for (int64_t c = 0; c < padded(dim); c += kWidth<Real>) {
      const Reg low = load(lo + c), high = load(hi + c), range = high - low;
      Reg inverse = range > most ? nan : one / range;
      inverse = low == high ? zero : inverse;
      store(scale + c, inverse);
      store(offset + c, fma(low, inverse, half));
    }
  }

  /// Bit i: block i of channels may use the offset, whose rounding then costs no more than that of x - lo.
  /// Blocks past the 64th never do.
  template <class T>
  uint64_t folded(int64_t dim) const {
    using Reg = RegOf<Real>;
    const Reg one = set1<Real>(1);
    uint64_t blocks = 0;
    for (int64_t c = 0, i = 0; c + kBlock<T> <= dim && i < 64; c += kBlock<T>, ++i) {
      typename LanesOf<Real>::IntReg small = ~typename LanesOf<Real>::IntReg{};
      for (int64_t j = c; j < c + kBlock<T>; j += kWidth<Real>) {
        const Reg x = load(offset + j);
        small &= (x <= one) & (x >= -one);
      }
      blocks |= static_cast<uint64_t>(all_lanes<Real>(small)) << i;
    }
    return blocks;
  }
};

/// Computes lane-wise sums of d and d^2 of kRows rows from `row` on, row r at fold_order(r); with kAdvance
/// also the next bounds. kBlocks is the number of blocks of dim, 0 for any dim.
template <class T, int kRows, bool kAdvance, int kBlocks>
__attribute__((noinline)) void std_rows(const T* row, int64_t stride, int64_t dim,
                                        const StdReference<RealOf<T>>& reference,
                                        const StdReference<RealOf<T>>& next, uint64_t folded,
                                        RegOf<RealOf<T>>* sum_out, RegOf<RealOf<T>>* square_out) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, block = kBlock<T>;
  Reg sum[kRows] = {}, squares[kRows] = {};
  const Reg half = set1<Real>(0.5);

  const auto step = [&](int64_t c, auto fold, const auto& read) {
    Block<T> x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = read(row + r * stride + c);
#pragma GCC unroll 2
    for (int i = 0; i < kBlockRegs<T>; ++i) {
      const Reg base = load((fold ? reference.offset : reference.lo) + c + i * width);
      const Reg scale = load(reference.scale + c + i * width);
      if constexpr (kAdvance) {
        Reg least = load(next.lo + c + i * width), most = load(next.hi + c + i * width);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) least = min(x[r].reg[i], least), most = max(x[r].reg[i], most);
        store(next.lo + c + i * width, least), store(next.hi + c + i * width, most);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Reg y = x[r].reg[i];
        const Reg d = read.mask(fold ? fms(y, scale, base) : fms(y - base, scale, half), i);
        sum[r] += d;
        squares[r] = fma(d, d, squares[r]);
      }
    }
  };
  const auto whole = [&](int64_t c) {
    if (folded & 1) {
      step(c, std::true_type(), Whole());
    } else {
      step(c, std::false_type(), Whole());
    }
    folded >>= 1;
  };

  if constexpr (kBlocks > 0) {
#pragma GCC unroll 1
    for (int c = 0; c < kBlocks * block; c += block) whole(c);
  } else {
    constexpr int64_t panel = kPanel * width;
    Reg panel_sum[kRows] = {}, panel_squares[kRows] = {};
    int64_t c = 0;
    for (int64_t end = panel; c + block <= dim; end += panel) {
      for (; c + block <= dim && c < end; c += block) whole(c);
      if (dim <= panel) break;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        panel_sum[r] += sum[r], panel_squares[r] += squares[r];
        sum[r] = squares[r] = Reg{};
      }
    }
    if (c < dim) step(c, std::false_type(), Part<T>(dim - c));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] += panel_sum[r], squares[r] += panel_squares[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    sum_out[fold_order<Real>(r)] = sum[r], square_out[fold_order<Real>(r)] = squares[r];
}

/// The statistic of one row as the reference computes it: true quotients, sums in float64, two passes.
template <class T>
__attribute__((noinline)) RealOf<T> std_exact(const T* row, int64_t dim,
                                              const StdReference<RealOf<T>>& reference) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, block = kBlock<T>;
  // Returns the sum over channels of y - centre, or of its square.
  const auto sum_of = [&](double centre, auto squared) {
    DoubleReg lanes = {};
    const auto add = [&](DoubleReg y) {
      const DoubleReg d = y - centre;
      lanes += squared ? d * d : d;
    };
    int64_t c = 0;
    for (; c + block <= dim; c += block) {
      const Block<T> x = Whole()(row + c);
      for (int i = 0; i < kBlockRegs<T>; ++i) {
        const Reg lo = load(reference.lo + c + i * width), hi = load(reference.hi + c + i * width);
        Real y[width];
        store(y, lo == hi ? Reg{} : (x.reg[i] - lo) / (hi - lo));
        for (int j = 0; j < width; j += kWidth<double>) add(load_double(y + j));
      }
    }
    double sum = sum_lanes<double>(lanes);
    for (; c < dim; ++c) {
      const Real lo = reference.lo[block_order<T>(c)], hi = reference.hi[block_order<T>(c)];
      const double d = (hi == lo ? Real(0) : (to_real(row[c]) - lo) / (hi - lo)) - centre;
      sum += squared ? d * d : d;
    }
    return sum;
  };
  const double mean = sum_of(0, std::false_type()) / static_cast<double>(dim);
  const double square = sum_of(mean, std::true_type());
  return static_cast<Real>(__builtin_sqrt(square / static_cast<double>(dim - 1)));
}

template <class Real>
inline void fill(Real* out, int64_t count, Real x) {
  for (int64_t i = 0; i < count; ++i) out[i] = x;
}

template <class T, bool kAdvance, int kBlocks>
void std_tile_sized(const Tile<T>& tile, const RealOf<T>* reference_data, RealOf<T>* statistic,
                    RealOf<T>* next_data) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, kRows = 4;
  const int64_t dim = tile.dim;
  if (dim <= 1) return fill(statistic, tile.count, Real(dim == 1 ? 0. : __builtin_nan("")));

  const StdReference<Real> reference(const_cast<Real*>(reference_data), dim), next(next_data, dim);
  const uint64_t folded = reference.template folded<T>(dim);
  if constexpr (kAdvance) {
    for (int64_t c = 0; c < padded(dim); c += width) {
      store(next.lo + c, set1<Real>(__builtin_inf()));
      store(next.hi + c, set1<Real>(-__builtin_inf()));
    }
  }
  const Reg degrees = set1<Real>(static_cast<Real>(dim - 1)), zero = {};
  const Reg inverse_dim = set1<Real>(1) / set1<Real>(static_cast<Real>(dim)),
            nan = set1<Real>(__builtin_nan(""));
  Reg not_finite = {}, inexact = {};
  for (int64_t first = 0; first < tile.count; first += width) {
    const int64_t rows = tile.count - first < width ? tile.count - first : width;
    const T* group = tile.rows + first * tile.row_stride;
    Reg sum[width], square[width];
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      prefetch(tile.upcoming, first + r, kRows);
      std_rows<T, kRows, kAdvance, kBlocks>(group + r * tile.row_stride, tile.row_stride, dim, reference,
                                            next, folded, sum + fold_order<Real>(r),
                                            square + fold_order<Real>(r));
    }
#pragma GCC unroll 1
    for (; r < rows; ++r) {
      std_rows<T, 1, kAdvance, 0>(group + r * tile.row_stride, tile.row_stride, dim, reference, next, folded,
                                  sum + fold_order<Real>(r), square + fold_order<Real>(r));
    }
#pragma GCC unroll 1
    for (; r < width; ++r) sum[fold_order<Real>(r)] = square[fold_order<Real>(r)] = zero;

    const Reg total = fold_sum<Real>(sum), squares = fold_sum<Real>(square);
    const Reg lost = total * inverse_dim * total;
    // Rounding may leave a square just below 0; a NaN passes max as its second operand.
    const Reg left = max(zero, squares - lost);
    const Reg s = sqrt(left / degrees);
    not_finite += s - s;
    const Reg checked = lost > set1<Real>(kMostLost) * left ? nan : s;
    store(statistic + first, checked);
    inexact += checked - checked;
  }

  if constexpr (kAdvance) {
    // min and max drop a NaN of this tile, but its row's statistic is NaN.
    if (sum_lanes<Real>(not_finite) != 0) bounds_in_order<T, true>(tile, next.lo, next.hi);
    next.set_scale(dim);
  }
  if (sum_lanes<Real>(inexact) == 0) return;
  for (int64_t t = 0; t < tile.count; ++t) {
    if (statistic[t] - statistic[t] == 0) continue;
    statistic[t] = std_exact(tile.rows + t * tile.row_stride, dim, reference);
    if (statistic[t] != statistic[t])
      return fill(statistic, tile.count, statistic[t]);  // softmax makes it so
  }
}

/// Common head dims have code of their own.
template <class T, bool kAdvance>
void std_tile(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic, RealOf<T>* next) {
  constexpr int block = kBlock<T>;
  switch (tile.dim) {
    case 64: return std_tile_sized<T, kAdvance, 64 / block>(tile, reference, statistic, next);
    case 96: return std_tile_sized<T, kAdvance, 96 / block>(tile, reference, statistic, next);
    case 128: return std_tile_sized<T, kAdvance, 128 / block>(tile, reference, statistic, next);
    case 192: return std_tile_sized<T, kAdvance, 192 / block>(tile, reference, statistic, next);
    case 256: return std_tile_sized<T, kAdvance, 256 / block>(tile, reference, statistic, next);
    default: return std_tile_sized<T, kAdvance, 0>(tile, reference, statistic, next);
  }
}

template <class T>
void std_reference(const Tile<T>& tile, RealOf<T>* reference_data) {
  const StdReference<RealOf<T>> reference(reference_data, tile.dim);
  bounds_in_order<T, true>(tile, reference.lo, reference.hi);
  reference.set_scale(tile.dim);
}

template <class T>
void std_statistic(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic) {
  std_tile<T, false>(tile, reference, statistic, nullptr);
}

template <class T>
void std_advance(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic, RealOf<T>* next) {
  std_tile<T, true>(tile, reference, statistic, next);
}

}  // namespace lagkv::cpu::LAGKV_ISA
