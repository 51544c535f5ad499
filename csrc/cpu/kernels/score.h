// Scores of the tokens of a partition from their statistics: softmax ("std"), standardisation ("cosine"), or
// s + L softmax ("blend"); and their means over neighbours.

namespace lagkv::cpu::LAGKV_ISA {

/// 1 / 2!, 1 / 3!, ...: on |r| <= ln(2) / 2 the terms left out are below a tenth of a rounding error.
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

/// Elements between two moves of a sum to float64, so that long partitions lose nothing to rounding.
template <class Real>
constexpr int64_t kScoreBlock = 64 * kWidth<Real>;

/// Replaces s by exp(s - max s); returns the factor that makes it the softmax.
template <class Real>
inline double exp_shifted(Real* s, int64_t count) {
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  for (int64_t i = count; i < padded(count); ++i) s[i] = -__builtin_inf();
  Reg most = set1<Real>(-__builtin_inf());
  for (int64_t i = 0; i < count; i += width) most = max(load(s + i), most);
  const Reg maximum = set1<Real>(reduce<Real>(most, Greater()));

  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kScoreBlock<Real>) {
    const int64_t end = count - begin < kScoreBlock<Real> ? count : begin + kScoreBlock<Real>;
    Reg sum = {};
    for (int64_t i = begin; i < end; i += width) {
      const Reg e = exp_negative<Real>(load(s + i) - maximum);
      store(s + i, e);
      sum += e;
    }
    total += sum_lanes<Real>(sum);
  }
  return 1 / total;
}

/// Replaces s by s - mean s; returns the factor for unit deviation (unbiased), 0 where the deviation is 0 or
/// there is one token.
template <class Real>
inline double centre(Real* s, int64_t count) {
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  if (count == 1) {
    s[0] = 0;
    return 0;
  }
  // Relative to the first token: where all are equal everything below is exactly 0.
  const Reg first = set1<Real>(s[0]);
  for (int64_t i = count; i < padded(count); ++i) s[i] = s[0];
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kScoreBlock<Real>) {
    const int64_t end = count - begin < kScoreBlock<Real> ? count : begin + kScoreBlock<Real>;
    Reg sum = {};
    for (int64_t i = begin; i < end; i += width) {
      const Reg d = load(s + i) - first;
      store(s + i, d);
      sum += d;
    }
    total += sum_lanes<Real>(sum);
  }
  const Real mean = static_cast<Real>(total / static_cast<double>(count));
  for (int64_t i = count; i < padded(count); ++i) s[i] = mean;
  double square = 0;
  for (int64_t begin = 0; begin < count; begin += kScoreBlock<Real>) {
    const int64_t end = count - begin < kScoreBlock<Real> ? count : begin + kScoreBlock<Real>;
    Reg sum = {};
    for (int64_t i = begin; i < end; i += width) {
      const Reg d = load(s + i) - set1<Real>(mean);
      store(s + i, d);
      sum = fma(d, d, sum);
    }
    square += sum_lanes<Real>(sum);
  }
  if (square < 1e-30) {  // float32 squares may have vanished
    square = 0;
    for (int64_t i = 0; i < count; ++i) square += static_cast<double>(s[i]) * s[i];
  }
  return square == 0 ? 0 : 1 / __builtin_sqrt(square / static_cast<double>(count - 1));
}

/// key = key_factor key + value_factor value; 0 times NaN is NaN, as in the reference.
template <class Real>
inline void combine(Real* key, double key_factor, const Real* value, double value_factor, int64_t count) {
  using Reg = RegOf<Real>;
  const Reg a = set1<Real>(static_cast<Real>(key_factor)), b = set1<Real>(static_cast<Real>(value_factor));
  for (int64_t i = 0; i < count; i += kWidth<Real>) {
    store(key + i, load(key + i) * a + load(value + i) * b);  // the same for key and value swapped
  }
}

template <class Real>
void std_score(Real* key, Real* value, int64_t count, double value_weight) {
  const double key_factor = exp_shifted(key, count), value_factor = exp_shifted(value, count);
  combine(key, key_factor, value, value_weight * value_factor, count);
}

template <class Real>
void cosine_score(Real* key, Real* value, int64_t count, double value_weight) {
  const double key_factor = centre(key, count), value_factor = centre(value, count);
  combine(key, key_factor, value, value_weight * value_factor, count);
}

/// Each side has its std statistic first, and the cosine statistic padded(count) reals after it.
template <class Real>
void blend_score(Real* key, Real* value, int64_t count, double value_weight) {
  using Reg = RegOf<Real>;
  const Real *key_cosine = key + padded(count), *value_cosine = value + padded(count);
  const double tokens = static_cast<double>(count);
  const Reg key_factor = set1<Real>(static_cast<Real>(tokens * exp_shifted(key, count))),
            value_factor = set1<Real>(static_cast<Real>(tokens * exp_shifted(value, count))),
            weight = set1<Real>(static_cast<Real>(value_weight));
  for (int64_t i = 0; i < count; i += kWidth<Real>) {
    const Reg of_key = load(key_cosine + i) + load(key + i) * key_factor;
    const Reg of_value = load(value_cosine + i) + load(value + i) * value_factor;
    store(key + i, of_key + weight * of_value);
  }
}

/// Terms are added in ascending position, as the reference adds them.
template <class Real>
void smooth(Real* score, int64_t count, int64_t smooth, Real* memory) {
  using Reg = RegOf<Real>;
  constexpr int width = kWidth<Real>;
  const int64_t reach = smoothing_reach(count, smooth), space = padded(reach);
  if (reach <= 0) return;
  Real* const scores = memory + space;
  for (int64_t i = 0; i < space; i += width) store(memory + i, Reg{});
  for (int64_t i = 0; i < count; ++i) scores[i] = score[i];
  for (int64_t i = count; i < padded(count) + space + kPadding; ++i) scores[i] = 0;
  const Reg inside = set1<Real>(static_cast<Real>(2 * reach + 1));
  for (int64_t i = 0; i < count; i += width) {
    Reg sum = {};
    for (int64_t offset = -reach; offset <= reach; ++offset) sum += load(scores + i + offset);
    Reg terms = inside;
    if (i < reach || i + width > count - reach) {
      for (int lane = 0; lane < width; ++lane) {
        const int64_t before = i + lane < reach ? i + lane : reach, after = count - 1 - (i + lane);
        terms[lane] = static_cast<Real>(before + (after < 0 ? 0 : after < reach ? after : reach) + 1);
      }
    }
    store(score + i, sum / terms);
  }
}

}  // namespace lagkv::cpu::LAGKV_ISA
