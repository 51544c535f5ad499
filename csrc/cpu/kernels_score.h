// From statistics to scores over the tokens of a partition: softmax ("std") or standardisation ("cosine").

namespace lagkv::cpu::LAGKV_ISA {

/// 1 / 2!, 1 / 3!, ...: on |r| <= ln(2) / 2 what follows these terms is below a tenth of a rounding error.
template <class Real>
struct ExpSeries {
  static constexpr int kTerms = sizeof(Real) == 4 ? 6 : 12;
  Real coefficient[kTerms] = {};
  constexpr ExpSeries() {
    double factorial = 1;
    for (int k = 0; k < kTerms; ++k) coefficient[k] = static_cast<Real>(1 / (factorial *= k + 2));
  }
};

/// Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits.
template <class Real>
constexpr Real kRound = sizeof(Real) == 4 ? 0x1.8p23 : 0x1.8p52;

/// 2^n for integers n whose power is a normal number.
template <class Real>
inline RegOf<Real> power_of_two(RegOf<Real> n) {
  using Lanes = LanesOf<Real>;
  const RegOf<Real> biased = n + set1<Real>(kRound<Real> + Lanes::kBias);
  return (RegOf<Real>)((typename Lanes::IntReg)biased << Lanes::kMantissa);
}

/// exp(x) for x <= 0, denormal results included. exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2.
template <class Real>
inline RegOf<Real> exp_negative(RegOf<Real> x) {
  using Reg = RegOf<Real>;
  constexpr bool single = sizeof(Real) == 4;
  constexpr Real kLn2High = single ? 0x1.62e4p-1 : 0x1.62e42fee00000p-1;  // n times this is exact
  constexpr Real kLn2Low = single ? 0x1.7f7d1cp-20 : 0x1.a39ef35793c76p-33;
  const Reg round = set1<Real>(kRound<Real>);
  x = max(set1<Real>(single ? -104. : -746.),
          x);  // the result is 0 there; a NaN passes as the second operand
  const Reg n = fma(x, set1<Real>(1.4426950408889634), round) - round;
  const Reg r = fnma(n, set1<Real>(kLn2Low), fnma(n, set1<Real>(kLn2High), x));
  constexpr ExpSeries<Real> terms;
  Reg series = {};
#pragma GCC unroll 12
  for (int k = terms.kTerms - 1; k >= 0; --k) series = fma(series, r, set1<Real>(terms.coefficient[k]));
  const Reg result = fma(series * r, r, r) + set1<Real>(1);
  // In two steps, for 2^n itself may be too small to be a normal number.
  const Reg half = fma(n, set1<Real>(0.5), round) - round;
  return result * power_of_two<Real>(half) * power_of_two<Real>(n - half);
}

/// s becomes softmax(s); s has room for padded(count).
template <class Real>
inline void softmax(Real* s, int64_t count) {
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  constexpr int64_t block = 64 * width;
  for (int64_t i = count; i < padded(count); ++i) s[i] = -__builtin_inf();
  Reg most = set1<Real>(-__builtin_inf());
  for (int64_t i = 0; i < count; i += width) most = max(load(s + i), most);
  Real maximum = most[0];
  for (int lane = 1; lane < width; ++lane) maximum = most[lane] > maximum ? most[lane] : maximum;

  double total = 0;  // in float64 beyond a block, so that long partitions lose nothing
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = count - begin < block ? count : begin + block;
    Reg sum = {};
    for (int64_t i = begin; i < end; i += width) {
      const Reg e = exp_negative<Real>(load(s + i) - set1<Real>(maximum));
      store(s + i, e);
      sum += e;
    }
    total += sum_lanes<Real>(sum);
  }
  const Reg divisor = set1<Real>(static_cast<Real>(total));
  for (int64_t i = 0; i < count; i += width) store(s + i, load(s + i) / divisor);
}

/// s becomes (s - mean) / std, unbiased; 0 where the deviation is 0 or there is one token.
template <class Real>
inline void standardise(Real* s, int64_t count) {
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  constexpr int64_t block = 64 * width;
  if (count == 1) {
    s[0] = 0;
    return;
  }
  // Relative to the first token: where all are equal everything below is exactly 0.
  const Real first = s[0];
  for (int64_t i = count; i < padded(count); ++i) s[i] = first;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = count - begin < block ? count : begin + block;
    Reg sum = {};
    for (int64_t i = begin; i < end; i += width) {
      const Reg d = load(s + i) - set1<Real>(first);
      store(s + i, d);
      sum += d;
    }
    total += sum_lanes<Real>(sum);
  }
  const Real mean = static_cast<Real>(total / static_cast<double>(count));
  for (int64_t i = count; i < padded(count); ++i) s[i] = mean;
  double square = 0;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = count - begin < block ? count : begin + block;
    Reg sum = {};
    for (int64_t i = begin; i < end; i += width) {
      const Reg d = load(s + i) - set1<Real>(mean);
      store(s + i, d);
      sum = fma(d, d, sum);
    }
    square += sum_lanes<Real>(sum);
  }
  const Real deviation = static_cast<Real>(__builtin_sqrt(square / static_cast<double>(count - 1)));
  const Reg zero = {}, divisor = set1<Real>(deviation);
  for (int64_t i = 0; i < count; i += width) store(s + i, divisor == zero ? zero : load(s + i) / divisor);
}

/// key += value_weight * value; 0 times NaN is NaN, as in the reference.
template <class Real>
inline void add_weighted(Real* key, const Real* value, int64_t count, double value_weight) {
  const RegOf<Real> weight = set1<Real>(static_cast<Real>(value_weight));
  for (int64_t i = 0; i < count; i += kWidth<Real>) store(key + i, load(key + i) + weight * load(value + i));
}

template <class Real>
void std_score(Real* key, Real* value, int64_t count, double value_weight) {
  softmax(key, count);
  softmax(value, count);
  add_weighted(key, value, count, value_weight);
}

template <class Real>
void cosine_score(Real* key, Real* value, int64_t count, double value_weight) {
  standardise(key, count);
  standardise(value, count);
  add_weighted(key, value, count, value_weight);
}

}  // namespace lagkv::cpu::LAGKV_ISA
