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
  /// Long partitions lose nothing to rounding: the partial sum moves to the total now and then.
  void flush(int64_t dim) const {
    for (int64_t c = 0; c < padded(dim); ++c) total[c] += partial[c], partial[c] = 0;
  }
  void finish(int64_t dim) const {
    flush(dim);
    double square = 0;
    for (int64_t c = 0; c < dim; ++c) square += total[c] * total[c];
    const double norm = __builtin_sqrt(square);
    for (int64_t c = 0; c < padded(dim); ++c)
      unit[c] = norm == 0 ? Real(0) : static_cast<Real>(total[c] / norm);
  }
};

constexpr int64_t kFlushRows = 256;

/// Lane-wise sums of x^2 and x a of kRows rows.
template <class T, int kRows, bool kStatistic>
inline void cosine_rows(const T* row, int64_t stride, int64_t dim, const RealOf<T>* anchor,
                        RegOf<RealOf<T>>* square, RegOf<RealOf<T>>* dot) {
  using Reg = RegOf<RealOf<T>>;
  constexpr int width = kWidth<RealOf<T>>;
  for (int r = 0; r < kRows; ++r) square[r] = dot[r] = Reg{};
  const auto step = [&](int64_t c, const auto& read) {
    Reg a = {};
    if constexpr (kStatistic) a = load(anchor + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg x = read(row + r * stride + c);
      square[r] = fma(x, x, square[r]);
      if constexpr (kStatistic) dot[r] = fma(x, a, dot[r]);
    }
  };
  Reg panel_square[kRows] = {}, panel_dot[kRows] = {};
  int64_t c = 0;
  for (int64_t panel = kPanel * width; c + width <= dim; panel += kPanel * width) {
    for (; c + width <= dim && c < panel; c += width) step(c, Whole());
    if (dim <= kPanel * width) break;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      panel_square[r] += square[r], panel_dot[r] += dot[r];
      square[r] = dot[r] = Reg{};
    }
  }
  if (c < dim) step(c, Part<RealOf<T>>(dim - c));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) square[r] += panel_square[r], dot[r] += panel_dot[r];
}

/// partial[c] += sum over rows of x[t, c] / |x[t]|. Products are rounded before they are added, so that
/// opposite directions cancel to exactly zero.
template <class T>
inline void add_directions(const T* first_row, int64_t stride, int64_t rows, int64_t dim,
                           const RealOf<T>* inverse_norm, RealOf<T>* partial) {
  using Real = RealOf<T>;
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  const auto step = [&](int64_t c, const auto& read) {
    Reg even = {}, odd = {};
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      even += read(first_row + r * stride + c) * set1<Real>(inverse_norm[r]);
      odd += read(first_row + (r + 1) * stride + c) * set1<Real>(inverse_norm[r + 1]);
    }
    if (r < rows) even += read(first_row + r * stride + c) * set1<Real>(inverse_norm[r]);
    store(partial + c, load(partial + c) + (even + odd));
  };
  int64_t c = 0;
  for (; c + width <= dim; c += width) step(c, Whole());
  if (c < dim) step(c, Part<RealOf<T>>(dim - c));
}

/// One row in float64: its statistic, and its direction added to `total` (null: not wanted).
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
    if (anchor != nullptr) dot += direction * anchor[c];
    if (total != nullptr) total[c] += direction;
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
    const int rows = static_cast<int>(tile.count - first < width ? tile.count - first : width);
    const T* group = tile.rows + first * stride;
    Reg square[width], dot[width], some_square[kRows], some_dot[kRows];
    int r = 0;
    for (; r + kRows <= rows; r += kRows) {
      prefetch(tile.ahead, first + r, kRows);
      cosine_rows<T, kRows, kStatistic>(group + r * stride, stride, dim, anchor, some_square, some_dot);
      for (int i = 0; i < kRows; ++i)
        square[slot<Real>(r + i)] = some_square[i], dot[slot<Real>(r + i)] = some_dot[i];
    }
    for (; r < rows; ++r) {
      cosine_rows<T, 1, kStatistic>(group + r * stride, stride, dim, anchor, some_square, some_dot);
      square[slot<Real>(r)] = some_square[0], dot[slot<Real>(r)] = some_dot[0];
    }
    for (; r < width; ++r) square[slot<Real>(r)] = one, dot[slot<Real>(r)] = zero;

    const Reg squares = fold_sum<Real>(square);
    const IntReg safe = (squares >= least) & (squares <= most);
    const Reg inverse = safe ? one / sqrt(squares) : zero;
    Real inverse_norm[width];
    store(inverse_norm, inverse);
    if constexpr (kStatistic) store(statistic + first, zero - fold_sum<Real>(dot) * inverse);
    if constexpr (kAnchor) add_directions(group, stride, rows, dim, inverse_norm, next.partial);
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
