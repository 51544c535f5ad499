// Selection of the highest scores of a row.

namespace lagkv::cpu::LAGKV_ISA {

/// Replaces scores by integers of the same order: NaN highest and all NaN equal, -0 equal to +0. Padding
/// becomes the least integer, to which no score maps. `least` and `most` are the extremes of the scores'
/// integers.
template <class Real>
inline void order_keys(Real* score, int64_t count, typename LanesOf<Real>::Int& least,
                       typename LanesOf<Real>::Int& most) {
  using Reg = RegOf<Real>;
  using Int = typename LanesOf<Real>::Int;
  using IntReg = typename LanesOf<Real>::IntReg;
  constexpr int width = kWidth<Real>, bits = 8 * sizeof(Int);
  constexpr Int highest = static_cast<Int>(~0ull >> (65 - bits)), lowest = -highest - 1;
  for (int64_t i = count; i < padded(count); ++i) score[i] = score[0];
  IntReg low = IntReg{} + highest, high = IntReg{} + lowest;
  for (int64_t i = 0; i < count; i += width) {
    const Reg x = load(score + i) + Reg{};  // -0 + 0 = +0
    const IntReg number = (IntReg)x;
    const IntReg ordered = number ^ ((number >> (bits - 1)) & highest);
    const IntReg key = x == x ? ordered : IntReg{} + highest;
    low = key < low ? key : low;
    high = key > high ? key : high;
    store_raw(score + i, key);
  }
  least = reduce<Real>(low, Less());
  most = reduce<Real>(high, Greater());
  for (int64_t i = count; i < padded(count); ++i) __builtin_memcpy(score + i, &lowest, sizeof lowest);
}

/// Writes the positions, plus `base`, of the `keep` highest scores in ascending order; of equal scores the
/// lower positions win.
///
/// Bisects the integers for a bound that `keep` of them exceed: about log2(count) + 3 counts where scores
/// differ.
template <class Real>
void select(Real* score, int64_t count, int64_t keep, int32_t base, int32_t* index) {
  using Int = typename LanesOf<Real>::Int;
  using Unsigned = std::make_unsigned_t<Int>;
  constexpr int width = kWidth<Real>;
  Int least, most;
  order_keys(score, count, least, most);
  const Int* keys = reinterpret_cast<const Int*>(score);  // read through greater_bits, which may alias

  // At least `keep` keys exceed `low`, fewer than `keep` exceed `high`.
  Int low = least - 1, high = most, bound = high;
  int64_t ties = -1;
  if (keep == count) bound = low, ties = 0;
  while (ties < 0) {
    const Unsigned distance = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    if (distance == 1) {  // the keys equal to `high` straddle the boundary
      bound = high;
      ties = keep - count_greater(keys, count, bound);
      break;
    }
    const Int middle = static_cast<Int>(static_cast<Unsigned>(low) + distance / 2);
    const int64_t greater = count_greater(keys, count, middle);
    if (greater == keep) {
      bound = middle;
      ties = 0;
    }
    const bool enough = greater >= keep;  // unpredictable: no branch
    low = enough ? middle : low;
    high = enough ? high : middle;
  }

  for (int64_t i = 0; i < count; i += 64) {
    uint64_t chosen = 0, equal = 0;
    for (int part = 0; part < 64 && i + part < count; part += width) {
      chosen |= greater_bits(keys + i + part, bound) << part;
      if (ties > 0) equal |= greater_bits(keys + i + part, bound - 1) << part;
    }
    equal &= ~chosen;
    for (; ties > 0 && equal != 0; --ties, equal &= equal - 1) chosen |= equal & -equal;
    for (; chosen != 0; chosen &= chosen - 1) {
      *index++ = base + static_cast<int32_t>(i) + __builtin_ctzll(chosen);
    }
  }
}

/// The inverse of order_keys, but for the sign of a zero and what kind of NaN one is.
template <class Real>
void restore(Real* score, int64_t count) {
  using Int = typename LanesOf<Real>::Int;
  using IntReg = typename LanesOf<Real>::IntReg;
  constexpr int bits = 8 * sizeof(Int);
  constexpr Int highest = static_cast<Int>(~0ull >> (65 - bits));
  for (int64_t i = 0; i < count; i += kWidth<Real>) {
    const IntReg key = load_raw<IntReg>(score + i);
    store_raw(score + i, key ^ ((key >> (bits - 1)) & highest));
  }
}

template <class T>
void widen(const T* row, int64_t count, RealOf<T>* out) {
  using Real = RealOf<T>;
  int64_t i = 0;
  for (; i + kWidth<Real> <= count; i += kWidth<Real>) store(out + i, load(row + i));
  for (; i < count; ++i) out[i] = to_real(row[i]);
}

}  // namespace lagkv::cpu::LAGKV_ISA
