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
    for (int64_t c = 0; c < dim; c += kWidth<Real>) {
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

  explicit LaneWeights(int64_t dim) {
    constexpr int width = kWidth<Real>;
    const Reg zero = {}, one = set1<Real>(1);
    const Reg count =
        set1<Real>(static_cast<Real>(dim / width)) + keep_lanes<Real>(one, first_lanes<Real>(dim % width));
    inverse_count = count == zero ? zero : one / count;
    set_level<0>(count);
  }

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

/// Lane-wise mean and squared deviation of kRows rows from `row` on; with kAdvance the rows also enter the
/// next bounds.
template <class T, int kRows, bool kAdvance>
inline void std_rows(const T* row, int64_t stride, int64_t dim, const StdReference<RealOf<T>>& reference,
                     const StdReference<RealOf<T>>& next, const LaneWeights<RealOf<T>>& weights,
                     RegOf<RealOf<T>>* mean, RegOf<RealOf<T>>* square) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  Reg shift[kRows], sum[kRows], squares[kRows], panel_sum[kRows] = {}, panel_squares[kRows] = {};

  const auto step = [&](int64_t c, auto is_first, const auto& read) {
    const Reg lo = load(reference.lo + c), scale = load(reference.scale + c);
    Reg least, most;
    if constexpr (kAdvance) least = load(next.lo + c), most = load(next.hi + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg x = read(row + r * stride + c);
      if constexpr (kAdvance) least = min(x, least), most = max(x, most);
      if constexpr (is_first) {
        shift[r] = (x - lo) * scale;
        sum[r] = squares[r] = shift[r] - shift[r];  // 0, or NaN where the row must be seen again
      } else {
        const Reg d = read.mask(fms(x - lo, scale, shift[r]));
        sum[r] += d;
        squares[r] = fma(d, d, squares[r]);
      }
    }
    if constexpr (kAdvance) store(next.lo + c, least), store(next.hi + c, most);
  };
  int64_t c = width;
  if (dim >= width) {
    step(0, std::true_type(), Whole());
    for (int64_t panel = kPanel * width; c + width <= dim; panel += kPanel * width) {
      for (; c + width <= dim && c < panel; c += width) step(c, std::false_type(), Whole());
      if (dim <= kPanel * width) break;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        panel_sum[r] += sum[r], panel_squares[r] += squares[r];
        sum[r] = squares[r] = Reg{};
      }
    }
    if (c < dim) step(c, std::false_type(), Part<Real>(dim - c));
  } else {
    step(0, std::true_type(), Part<Real>(dim));
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Reg total = sum[r] + panel_sum[r], average = total * weights.inverse_count;
    mean[r] = shift[r] + average;
    square[r] = fnma(average, total, squares[r] + panel_squares[r]);
  }
}

template <class T>
__attribute__((noinline)) RealOf<T> std_exact(const T* row, int64_t dim,
                                              const StdReference<RealOf<T>>& reference) {
  using Real = RealOf<T>;
  const auto y = [&](int64_t c) -> double {
    const Real lo = reference.lo[c], hi = reference.hi[c];
    return hi == lo ? Real(0) : (to_real(row[c]) - lo) / (hi - lo);
  };
  double mean = 0, square = 0;
  for (int64_t c = 0; c < dim; ++c) mean += y(c);
  mean /= static_cast<double>(dim);
  for (int64_t c = 0; c < dim; ++c) square += (y(c) - mean) * (y(c) - mean);
  return static_cast<Real>(__builtin_sqrt(square / static_cast<double>(dim - 1)));
}

template <class Real>
inline void fill(Real* out, int64_t count, Real x) {
  for (int64_t i = 0; i < count; ++i) out[i] = x;
}

template <class T, bool kAdvance>
void std_tile(const Tile<T>& tile, const RealOf<T>* reference_data, RealOf<T>* statistic,
              RealOf<T>* next_data) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, kRows = 4;
  const int64_t dim = tile.dim;
  if (dim <= 1) return fill(statistic, tile.count, Real(dim == 1 ? 0. : __builtin_nan("")));

  const StdReference<Real> reference(const_cast<Real*>(reference_data), dim), next(next_data, dim);
  const LaneWeights<Real> weights(dim);
  if constexpr (kAdvance) {
    for (int64_t c = 0; c < dim; c += width) {
      store(next.lo + c, set1<Real>(__builtin_inf()));
      store(next.hi + c, set1<Real>(-__builtin_inf()));
    }
  }
  const Reg degrees = set1<Real>(static_cast<Real>(dim - 1)), zero = {};
  Reg not_finite = {};
  for (int64_t first = 0; first < tile.count; first += width) {
    const int rows = static_cast<int>(tile.count - first < width ? tile.count - first : width);
    Reg mean[width], square[width];
    Reg some_mean[kRows], some_square[kRows];
    int r = 0;
    for (; r + kRows <= rows; r += kRows) {
      const T* row = tile.rows + (first + r) * tile.row_stride;
      prefetch(tile.ahead, first + r, kRows);
      std_rows<T, kRows, kAdvance>(row, tile.row_stride, dim, reference, next, weights, some_mean,
                                   some_square);
      for (int i = 0; i < kRows; ++i)
        mean[slot<Real>(r + i)] = some_mean[i], square[slot<Real>(r + i)] = some_square[i];
    }
    for (; r < rows; ++r) {
      const T* row = tile.rows + (first + r) * tile.row_stride;
      std_rows<T, 1, kAdvance>(row, tile.row_stride, dim, reference, next, weights, some_mean, some_square);
      mean[slot<Real>(r)] = some_mean[0], square[slot<Real>(r)] = some_square[0];
    }
    for (; r < width; ++r) mean[slot<Real>(r)] = square[slot<Real>(r)] = zero;

    // Rounding may leave a square just below 0; a NaN passes max as its second operand.
    const Reg s = sqrt(max(zero, fold_deviation<Real>(mean, square, weights)) / degrees);
    store(statistic + first, s);
    not_finite += s - s;
  }

  if constexpr (kAdvance) {
    // min and max have dropped any NaN of this tile, but it has made its row's statistic NaN.
    if (sum_lanes<Real>(not_finite) != 0) bounds(tile, next.lo, next.hi);
    next.set_scale(dim);
  }
  if (sum_lanes<Real>(not_finite) == 0) return;
  for (int64_t t = 0; t < tile.count; ++t) {
    if (statistic[t] - statistic[t] == 0) continue;
    statistic[t] = std_exact(tile.rows + t * tile.row_stride, dim, reference);
    if (statistic[t] != statistic[t])
      return fill(statistic, tile.count, statistic[t]);  // softmax makes it so
  }
}

template <class T>
void std_reference(const Tile<T>& tile, RealOf<T>* reference_data) {
  const StdReference<RealOf<T>> reference(reference_data, tile.dim);
  bounds(tile, reference.lo, reference.hi);
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
