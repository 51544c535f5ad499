// The direction statistic: s[t] = -cos(x[t], a) with a = mean_t x[t] / |x[t]| over the next partition.
//
// Rows go in groups of W. A first pass over the group takes squared norms and dot products, a second one,
// while the rows are in the L1 cache, adds x / |x| to the anchor of this partition. Rows whose squared norm
// leaves the safe range of Real (zero, NaN, infinite, denormal, huge) are computed one by one in float64.

namespace lagkv::cpu::LAGKV_ISA {

/// The mean direction of a partition, in an array of reference_size(dim) reals: the anchor (a unit vector, or
/// zero where the mean has no direction), a partial sum, and a float64 total.
template <class Real>
struct Anchor {
  Real *unit, *partial;
  double* total;
  Anchor(Real* reference, int64_t dim)
      : unit(reference),
        partial(reference + padded(dim)),
        total(reinterpret_cast<double*>(reference + 2 * padded(dim))) {}

  void clear(int64_t dim) const {
    for (int64_t c = 0; c < padded(dim); ++c) partial[c] = 0, total[c] = 0;
  }
  /// Adds the partial sum to the total, so that long partitions lose nothing to rounding.
  void flush(int64_t dim) const {
    for (int64_t c = 0; c < padded(dim); ++c) total[c] += partial[c], partial[c] = 0;
  }
  void finish(int64_t dim) const {
    flush(dim);
    DoubleReg squares = {};
    for (int64_t c = 0; c < padded(dim); c += kWidth<double>) {
      const DoubleReg sum = load(total + c);
      squares = fma(sum, sum, squares);
    }
    const double norm = __builtin_sqrt(sum_lanes<double>(squares)), inverse = norm == 0 ? 0 : 1 / norm;
    for (int64_t c = 0; c < padded(dim); ++c) unit[c] = static_cast<Real>(total[c] * inverse);
  }
};

constexpr int64_t kFlushRows = 256;

/// Computes lane-wise sums of x^2 and x a of kRows rows, row r at fold_order(r).
template <class T, int kRows, bool kStatistic>
__attribute__((noinline)) void cosine_rows(const T* row, int64_t stride, int64_t dim, const RealOf<T>* anchor,
                                           RegOf<RealOf<T>>* square, RegOf<RealOf<T>>* dot) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, block = kBlock<T>;
  constexpr int64_t panel = kPanel * width;
  Reg squares[kRows] = {}, dots[kRows] = {}, panel_squares[kRows] = {}, panel_dots[kRows] = {};
  const auto step = [&](int64_t c, const auto& read) {
    Block<T> x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = read(row + r * stride + c);
#pragma GCC unroll 2
    for (int i = 0; i < kBlockRegs<T>; ++i) {
      Reg a = {};
      if constexpr (kStatistic) a = load(anchor + c + i * width);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        squares[r] = fma(x[r].reg[i], x[r].reg[i], squares[r]);
        if constexpr (kStatistic) dots[r] = fma(x[r].reg[i], a, dots[r]);
      }
    }
  };
  int64_t c = 0;
  for (int64_t end = panel; c + block <= dim; end += panel) {
    for (; c + block <= dim && c < end; c += block) step(c, Whole());
    if (dim <= panel) break;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      panel_squares[r] += squares[r], panel_dots[r] += dots[r];
      squares[r] = dots[r] = Reg{};
    }
  }
  if (c < dim) step(c, Part<T>(dim - c));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    square[fold_order<Real>(r)] = squares[r] + panel_squares[r];
    dot[fold_order<Real>(r)] = dots[r] + panel_dots[r];
  }
}

/// Adds the sum over kRows rows of x[t, c] / |x[t]| to partial[c]. Products are rounded before they are
/// added, so that opposite directions cancel to exactly zero.
template <class T, int kRows>
__attribute__((noinline)) void add_directions(const T* row, int64_t stride, int64_t dim,
                                              const RealOf<T>* inverse_norm, RealOf<T>* partial) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>, regs = kBlockRegs<T>, block = kBlock<T>;
  Reg inverse[kRows];
  for (int r = 0; r < kRows; ++r) inverse[r] = set1<Real>(inverse_norm[r]);
  const auto step = [&](int64_t c, const auto& read) {
    Block<T> x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = read(row + r * stride + c);
#pragma GCC unroll 2
    for (int i = 0; i < regs; ++i) {
      Reg sum = x[0].reg[i] * inverse[0];
      if constexpr (kRows == 4) {
        sum = (sum + x[1].reg[i] * inverse[1]) + (x[2].reg[i] * inverse[2] + x[3].reg[i] * inverse[3]);
      }
      Real* out = partial + c + i * width;
      store(out, load(out) + sum);
    }
  };
  int64_t c = 0;
  for (; c + block <= dim; c += block) step(c, Whole());
  if (c < dim) step(c, Part<T>(dim - c));
}

/// Computes the statistic of one row in float64 and, unless `total` is null, adds its direction to it.
template <class T>
__attribute__((noinline)) RealOf<T> cosine_exact(const T* row, int64_t dim, const RealOf<T>* anchor,
                                                 double* total) {
  // A row of norm 0 has no direction; an anchor that is NaN is so in every channel.
  bool zero = true;
  for (int64_t c = 0; c < dim; ++c) zero &= to_real(row[c]) == 0;
  if (zero) return anchor != nullptr && dim > 0 ? 0 * anchor[0] : 0;

  double square = 0, dot = 0;
  for (int64_t c = 0; c < dim; ++c) square += static_cast<double>(to_real(row[c])) * to_real(row[c]);
  const double norm = __builtin_sqrt(square);
  for (int64_t c = 0; c < dim; ++c) {
    const double direction = norm == 0 ? 0 : to_real(row[c]) / norm;  // float64 squares may vanish, too
    if (anchor != nullptr) dot += direction * anchor[block_order<T>(c)];
    if (total != nullptr) total[block_order<T>(c)] += direction;
  }
  return static_cast<RealOf<T>>(-dot);
}

template <class T, bool kStatistic, bool kAnchor>
void cosine_tile(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic,
                 RealOf<T>* next_data) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  using IntReg = typename LanesOf<Real>::IntReg;
  constexpr int width = kWidth<Real>, kRows = 4;
  const int64_t dim = tile.dim, stride = tile.row_stride;
  const Real* anchor = kStatistic ? Anchor<Real>(const_cast<Real*>(reference), dim).unit : nullptr;
  const Anchor<Real> next(kAnchor ? next_data : nullptr, dim);
  if constexpr (kAnchor) next.clear(dim);
  const Reg least = set1<Real>(sizeof(Real) == 4 ? 1e-30 : 1e-280),
            most = set1<Real>(sizeof(Real) == 4 ? 1e37 : 1e300);
  const Reg one = set1<Real>(1), zero = {};

  for (int64_t first = 0; first < tile.count; first += width) {
    const int64_t rows = tile.count - first < width ? tile.count - first : width;
    const T* group = tile.rows + first * stride;
    Reg square[width], dot[width];
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      prefetch(tile.upcoming, first + r, kRows);
      cosine_rows<T, kRows, kStatistic>(group + r * stride, stride, dim, anchor, square + fold_order<Real>(r),
                                        dot + fold_order<Real>(r));
    }
#pragma GCC unroll 1
    for (; r < rows; ++r) {
      cosine_rows<T, 1, kStatistic>(group + r * stride, stride, dim, anchor, square + fold_order<Real>(r),
                                    dot + fold_order<Real>(r));
    }
#pragma GCC unroll 1
    for (; r < width; ++r) square[fold_order<Real>(r)] = one, dot[fold_order<Real>(r)] = zero;

    const Reg squares = fold_sum<Real>(square);
    const IntReg safe = (squares >= least) & (squares <= most);
    const Reg inverse = safe ? one / sqrt(squares) : zero;
    Real inverse_norm[width];
    store(inverse_norm, inverse);
    if constexpr (kStatistic) store(statistic + first, zero - fold_sum<Real>(dot) * inverse);
    if constexpr (kAnchor) {
      int64_t i = 0;
      for (; i + kRows <= rows; i += kRows) {
        add_directions<T, kRows>(group + i * stride, stride, dim, inverse_norm + i, next.partial);
      }
      for (; i < rows; ++i)
        add_directions<T, 1>(group + i * stride, stride, dim, inverse_norm + i, next.partial);
    }
    for (int i = 0; i < rows; ++i) {
      if (inverse_norm[i] != 0) continue;
      const Real s = cosine_exact(group + i * stride, dim, anchor, kAnchor ? next.total : nullptr);
      if constexpr (kStatistic) statistic[first + i] = s;
    }
    if constexpr (kAnchor) {
      if ((first + width) % kFlushRows == 0) next.flush(dim);
    }
  }
  if constexpr (kAnchor) next.finish(dim);
}

template <class T>
void cosine_reference(const Tile<T>& tile, RealOf<T>* reference) {
  cosine_tile<T, false, true>(tile, nullptr, nullptr, reference);
}

template <class T>
void cosine_statistic(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic) {
  cosine_tile<T, true, false>(tile, reference, statistic, nullptr);
}

template <class T>
void cosine_advance(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic, RealOf<T>* next) {
  cosine_tile<T, true, true>(tile, reference, statistic, next);
}

}  // namespace lagkv::cpu::LAGKV_ISA
