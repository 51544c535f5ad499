// The paper's statistic: s[t] = std_c((x[t, c] - lo_c) / (hi_c - lo_c)), unbiased, against the bounds of the
// next partition.
//
// Every lane of a row's vectors keeps the mean and the squared deviation of its own channels, shifted by the
// first of them:
//     d = y - y_first,  m = y_first + sum(d) / n,  q = sum(d^2) - sum(d)^2 / n
// and lanes are merged pairwise (Chan, Golub, LeVeque 1979): with delta = m_b - m_a,
//     m = m_a + delta n_b / (n_a + n_b),  q = q_a + q_b + delta^2 n_a n_b / (n_a + n_b).
// One pass over the row, no horizontal step per row, and no cancellation however far the row's mean lies from
// 0. A row whose result is not finite is computed again as the reference does it, with sums in float64.

namespace lagkv::cpu::LAGKV_ISA {

constexpr int kMostLost = 3;  // 1 for normal data

/// The bounds of a partition as the statistic wants them: an array of reference_size(dim) reals.
template <class Real>
struct StdReference {
  Real *lo, *hi, *scale;
  StdReference(Real* reference, int64_t dim)
      : lo(reference), hi(reference + padded(dim)), scale(reference + 2 * padded(dim)) {}

  void set_scale(int64_t dim) const {
    using Reg = RegOf<Real>;
    const Reg one = set1<Real>(1), zero = {};
    // A quotient by more than this is denormal or nearly: NaN sends the rows to the exact path.
    const Reg most = set1<Real>(sizeof(Real) == 4 ? 1e37 : 1e307), nan = set1<Real>(__builtin_nan(""));
    for (int64_t c = 0; c < padded(dim); c += kWidth<Real>) {
      const Reg low = load(lo + c), high = load(hi + c), range = high - low;
      Reg inverse = range > most ? nan : one / range;
      store(scale + c, low == high ? zero : inverse);
    }
  }
};

/// How many channels of a row fall on each lane, and what merging lanes needs of these counts, level by
/// level.
template <class Real>
struct LaneWeights {
  using Reg = RegOf<Real>;
  Reg inverse_count, fraction[kLevels<Real>], weight[kLevels<Real>];

  template <class T>
  static LaneWeights of(int64_t dim) {
    LaneWeights weights;
    const Part<T> part(dim % kBlock<T>);
    const Reg zero = {}, one = set1<Real>(1);
    Reg count = set1<Real>(static_cast<Real>(dim / kBlock<T> * kBlockRegs<T>));
    for (int i = 0; i < kBlockRegs<T>; ++i) count += part.mask(one, i);
    weights.inverse_count = count == zero ? zero : one / count;
    weights.template set_level<0>(count);
    return weights;
  }

 private:
  template <int kLevel>
  void set_level(Reg count) {
    if constexpr (kLevel < kLevels<Real>) {
      Reg low, high;
      pair<Real, kLevel>(count, count, low, high);
      const Reg zero = {}, sum = low + high, share = sum == zero ? zero : high / sum;
      fraction[kLevel] = share;
      weight[kLevel] = low * share;
      set_level<kLevel + 1>(sum);
    }
  }
};

/// `mean` and `square` hold row i at slot(i); the squared deviation of row i comes out in lane i.
template <class Real, int kLevel = 0>
inline RegOf<Real> fold_deviation(RegOf<Real>* mean, RegOf<Real>* square, const LaneWeights<Real>& weights) {
  using Reg = RegOf<Real>;
  if constexpr (kLevel == kLevels<Real>) {
    return square[0];
  } else {
#pragma GCC unroll 8
    for (int k = 0; k < (kWidth<Real> >> (kLevel + 1)); ++k) {
      Reg mean_a, mean_b, square_a, square_b;
      pair<Real, kLevel>(mean[2 * k], mean[2 * k + 1], mean_a, mean_b);
      pair<Real, kLevel>(square[2 * k], square[2 * k + 1], square_a, square_b);
      const Reg delta = mean_b - mean_a;
      mean[k] = fma(delta, weights.fraction[kLevel], mean_a);
      square[k] = fma(delta * weights.weight[kLevel], delta, square_a + square_b);
    }
    return fold_deviation<Real, kLevel + 1>(mean, square, weights);
  }
}

/// Lane-wise mean and squared deviation of kRows rows from `row` on, row r at slot(r); with kAdvance the rows
/// also enter the next bounds. kBlocks: dim is as many whole blocks; 0: any dim.
template <class T, int kRows, bool kAdvance, int kBlocks>
__attribute__((noinline)) void std_rows(const T* row, int64_t stride, int64_t dim,
                                        const StdReference<RealOf<T>>& reference,
                                        const StdReference<RealOf<T>>& next,
                                        const LaneWeights<RealOf<T>>& weights, RegOf<RealOf<T>>* mean,
                                        RegOf<RealOf<T>>* square, RegOf<RealOf<T>>* cancelled) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, block = kBlock<T>;
  Reg shift[kRows], sum[kRows], squares[kRows];

  const auto step = [&](int64_t c, auto is_first, const auto& read) {
    Block<T> x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = read(row + r * stride + c);
#pragma GCC unroll 2
    for (int i = 0; i < kBlockRegs<T>; ++i) {
      const Reg lo = load(reference.lo + c + i * width), scale = load(reference.scale + c + i * width);
      if constexpr (kAdvance) {
        Reg least = load(next.lo + c + i * width), most = load(next.hi + c + i * width);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) least = min(x[r].reg[i], least), most = max(x[r].reg[i], most);
        store(next.lo + c + i * width, least), store(next.hi + c + i * width, most);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (is_first && i == 0) {
          shift[r] = (x[r].reg[i] - lo) * scale;
          sum[r] = squares[r] = Reg{};
        } else {
          const Reg d = read.mask(fms(x[r].reg[i] - lo, scale, shift[r]), i);
          sum[r] += d;
          squares[r] = fma(d, d, squares[r]);
        }
      }
    }
  };

  if constexpr (kBlocks > 0) {
    step(0, std::true_type(), Whole());
#pragma GCC unroll 1
    for (int c = block; c < kBlocks * block; c += block) step(c, std::false_type(), Whole());
  } else if (dim < block) {
    step(0, std::true_type(), Part<T>(dim));
  } else {
    constexpr int64_t panel = kPanel * width;
    Reg panel_sum[kRows] = {}, panel_squares[kRows] = {};
    step(0, std::true_type(), Whole());
    int64_t c = block;
    for (int64_t end = panel; c + block <= dim; end += panel) {
      for (; c + block <= dim && c < end; c += block) step(c, std::false_type(), Whole());
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
  for (int r = 0; r < kRows; ++r) {
    const Reg average = sum[r] * weights.inverse_count;
    mean[slot<Real>(r)] = shift[r] + average;
    cancelled[slot<Real>(r)] = average * sum[r];
    square[slot<Real>(r)] = fnma(average, sum[r], squares[r]);
  }
}

/// The statistic of one row as the reference computes it: true quotients, sums in float64, two passes.
template <class T>
__attribute__((noinline)) RealOf<T> std_exact(const T* row, int64_t dim,
                                              const StdReference<RealOf<T>>& reference) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, block = kBlock<T>;
  // Sum over channels of y - centre, or of its square.
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
      const Real lo = reference.lo[position<T>(c)], hi = reference.hi[position<T>(c)];
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
  const LaneWeights<Real> weights = LaneWeights<Real>::template of<T>(dim);
  if constexpr (kAdvance) {
    for (int64_t c = 0; c < padded(dim); c += width) {
      store(next.lo + c, set1<Real>(__builtin_inf()));
      store(next.hi + c, set1<Real>(-__builtin_inf()));
    }
  }
  const Reg degrees = set1<Real>(static_cast<Real>(dim - 1)), zero = {};
  const Reg nan = set1<Real>(__builtin_nan(""));
  Reg not_finite = {}, inexact = {};
  for (int64_t first = 0; first < tile.count; first += width) {
    const int64_t rows = tile.count - first < width ? tile.count - first : width;
    const T* group = tile.rows + first * tile.row_stride;
    Reg mean[width], square[width], cancelled[width];
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      prefetch(tile.ahead, first + r, kRows);
      std_rows<T, kRows, kAdvance, kBlocks>(group + r * tile.row_stride, tile.row_stride, dim, reference,
                                            next, weights, mean + slot<Real>(r), square + slot<Real>(r),
                                            cancelled + slot<Real>(r));
    }
#pragma GCC unroll 1
    for (; r < rows; ++r) {
      std_rows<T, 1, kAdvance, 0>(group + r * tile.row_stride, tile.row_stride, dim, reference, next, weights,
                                  mean + slot<Real>(r), square + slot<Real>(r), cancelled + slot<Real>(r));
    }
#pragma GCC unroll 1
    for (; r < width; ++r) {
      mean[slot<Real>(r)] = square[slot<Real>(r)] = cancelled[slot<Real>(r)] = zero;
    }

    const Reg lost = fold_sum<Real>(cancelled);
    // Rounding may leave a square just below 0; a NaN passes max as its second operand.
    const Reg total = max(zero, fold_deviation<Real>(mean, square, weights));
    const Reg s = sqrt(total / degrees);
    not_finite += s - s;
    const Reg checked = lost > set1<Real>(kMostLost) * total ? nan : s;
    store(statistic + first, checked);
    inexact += checked - checked;
  }

  if constexpr (kAdvance) {
    // min and max have dropped any NaN of this tile, but it has made its row's statistic NaN.
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

/// The head dims of models have their own code.
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
