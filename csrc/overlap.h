// Decides exactly whether strided arrays share a byte. No torch.
//
// An array is an element at address + sum of index_d stride_d for every index. Two arrays share a byte where
//     sum of step_k x_k = target,  0 <= x_k <= most_k
// has a solution in integers: the steps are the strides of both and 1 (a byte within a run), the target is
// the distance of the addresses. A search over few terms, largest step first, decides that at once for all
// layouts that tensors have. Where it does not, the runs of both are listed and sorted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace lagkv {

/// The bytes of a strided array: runs of `run` consecutive bytes. Dimensions ascend in stride; those of one
/// element are left out, those that continue one another are one.
class Footprint {
 public:
  static constexpr int64_t kMaxDims = 6;

  struct Dim {
    int64_t size, stride;  // at least 2 runs; bytes
  };

  /// Sizes and strides in elements, of at most kMaxDims dimensions; strides are not negative.
  Footprint(const void* address, int64_t element_bytes, int64_t dims, const int64_t* sizes,
            const int64_t* strides)
      : begin_(reinterpret_cast<uintptr_t>(address)), run_(element_bytes) {
    Dim sorted[kMaxDims];
    int64_t count = 0;
    for (int64_t d = 0; d < dims; ++d) {
      if (sizes[d] == 0) run_ = 0;
      if (sizes[d] <= 1) continue;
      int64_t at = count++;
      for (; at > 0 && sorted[at - 1].stride > strides[d] * element_bytes; --at) sorted[at] = sorted[at - 1];
      sorted[at] = {sizes[d], strides[d] * element_bytes};
    }
    if (run_ == 0) return;
    for (int64_t d = 0; d < count; ++d) {
      const Dim& next = sorted[d];
      if (count_ == 0 && next.stride == run_) {
        run_ *= next.size;
      } else if (count_ > 0 && next.stride == dims_[count_ - 1].stride * dims_[count_ - 1].size) {
        dims_[count_ - 1].size *= next.size;
      } else {
        dims_[count_++] = next;
      }
    }
  }

  bool empty() const { return run_ == 0; }
  uintptr_t begin() const { return begin_; }
  uintptr_t end() const { return begin_ + static_cast<uintptr_t>(span()); }
  int64_t run() const { return run_; }
  int64_t dims() const { return count_; }
  const Dim& dim(int64_t d) const { return dims_[d]; }

  /// Bytes from the first to the last, both included.
  int64_t span() const {
    int64_t bytes = run_;
    for (int64_t d = 0; d < count_; ++d) bytes += (dims_[d].size - 1) * dims_[d].stride;
    return bytes;
  }

  /// The addresses of the runs that have a byte in [from, to).
  std::vector<uintptr_t> runs_between(uintptr_t from, uintptr_t to) const {
    std::vector<uintptr_t> runs;
    int64_t index[kMaxDims] = {};
    for (uintptr_t run = begin_;;) {
      if (run < to && run + static_cast<uintptr_t>(run_) > from) runs.push_back(run);
      int64_t d = 0;
      for (; d < count_ && ++index[d] == dims_[d].size; ++d) {
        run -= static_cast<uintptr_t>((dims_[d].size - 1) * dims_[d].stride);
        index[d] = 0;
      }
      if (d == count_) return runs;
      run += static_cast<uintptr_t>(dims_[d].stride);
    }
  }

 private:
  uintptr_t begin_;
  int64_t run_;
  int64_t count_ = 0;
  Dim dims_[kMaxDims];
};

/// Decides whether sum of step_k x_k = target has a solution with 0 <= x_k <= most_k. Steps are positive.
class BoundedSum {
 public:
  enum class Answer { kNo, kYes, kUnknown };

  void add(int64_t step, int64_t most) {
    if (most == 0) return;
    int at = count_++;
    for (; at > 0 && terms_[at - 1].step < step; --at) terms_[at] = terms_[at - 1];
    terms_[at] = {step, most};
    if (at > 0 && terms_[at - 1].step == step) {  // x and y in one: their sum takes every value
      terms_[at - 1].most += most;
      for (--count_; at < count_; ++at) terms_[at] = terms_[at + 1];
    }
  }

  /// kUnknown after `work` steps of the search.
  Answer reaches(int64_t target, int64_t work) {
    int64_t sum = 0, divisor = 0;
    bool dense = true;
    for (int k = count_ - 1; k >= 0; --k) {
      Term& term = terms_[k];
      // The smaller terms reach every multiple of their divisor up to their sum, and so do these if no gap is
      // left between two multiples of the step.
      dense = dense && (divisor == 0 || (term.step % divisor == 0 && term.step <= sum + divisor));
      sum += term.step * term.most;
      divisor = std::gcd(divisor, term.step);
      term.sum = sum;
      term.divisor = divisor;
      term.dense = dense;
    }
    work_ = work;
    return search(0, target);
  }

 private:
  /// A term; of it and all smaller ones: the greatest sum, the common divisor of the steps, and whether every
  /// multiple of it up to the sum is reached.
  struct Term {
    int64_t step, most;
    int64_t sum = 0, divisor = 0;
    bool dense = false;
  };

  Answer search(int k, int64_t target) {
    if (target == 0) return Answer::kYes;
    if (k == count_ || target < 0 || target > terms_[k].sum || target % terms_[k].divisor != 0) {
      return Answer::kNo;
    }
    const Term& term = terms_[k];
    if (term.dense) return Answer::kYes;
    const Term& rest = terms_[k + 1];  // the last term is dense
    if (k + 2 < count_ && terms_[k + 2].dense && terms_[k + 2].divisor == term.divisor) {
      return two_reach(term, rest, terms_[k + 2].sum, target) ? Answer::kYes : Answer::kNo;
    }
    const int64_t least = target > rest.sum ? divided_up(target - rest.sum, term.step) : int64_t{0};
    const int64_t most = std::min(term.most, target / term.step);
    // Only every `period`-th x leaves a multiple of the divisor of the rest.
    const int64_t period = rest.divisor / term.divisor;
    int64_t x = least + (first_multiple(target, term, period) - least % period + period) % period;
    for (; x <= most; x += period) {
      if (--work_ < 0) return Answer::kUnknown;
      const Answer answer = search(k + 1, target - term.step * x);
      if (answer != Answer::kNo) return answer;
    }
    return Answer::kNo;
  }

  static int64_t divided_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

  /// True where 0 <= target - a.step x - b.step y <= slack for some x and y. Between 0 and `slack` every
  /// multiple of the common divisor counts.
  static bool two_reach(const Term& a, const Term& b, int64_t slack, int64_t target) {
    const int64_t most_y = b.step * b.most;
    const int64_t least = divided_up(std::max<int64_t>(0, target - slack - most_y), a.step);
    const int64_t most = std::min(a.most, target / a.step);
    if (least > most) return false;
    // The rest that x leaves falls as x grows. y = 0 serves the last x, y = b.most the first one, or no x at
    // all.
    if (target - a.step * most <= slack || target - a.step * least >= most_y) return true;
    // In between y is free: x must leave 0 .. slack modulo b.step.
    const int64_t left = (target - a.step * least) % b.step;
    if (left <= slack) return true;
    const int64_t steps = first_between(a.step % b.step, b.step, left - slack, left);
    return steps >= 0 && steps <= most - least;
  }

  /// The least x with low <= step x modulo `modulus` <= high, or -1; 0 < low <= high < modulus. As Euclid's
  /// algorithm: each call at least halves the modulus.
  static int64_t first_between(int64_t step, int64_t modulus, int64_t low, int64_t high) {
    if (step == 0) return -1;
    if (2 * step > modulus) return first_between(modulus - step, modulus, modulus - high, modulus - low);
    const int64_t x = divided_up(low, step);
    if (x * step <= high) return x;
    // No multiple of the step lies between: the modulus must have been passed y times, and low + modulus y ..
    // high + modulus y must hold one.
    const int64_t y = first_between((step - modulus % step) % step, step, low % step, high % step);
    if (y < 0) return -1;
    return static_cast<int64_t>((static_cast<__int128>(modulus) * y + low + step - 1) / step);
  }

  /// The x in 0 .. period-1 with step x = target modulo the divisor of the smaller terms.
  static int64_t first_multiple(int64_t target, const Term& term, int64_t period) {
    if (period == 1) return 0;
    const int64_t step = term.step / term.divisor % period;
    // The inverse of the step modulo the period, by Euclid's algorithm.
    int64_t a = period, b = step, inverse = 0, next = 1;
    while (b != 0) {
      const int64_t quotient = a / b;
      inverse -= quotient * next;
      std::swap(inverse, next);
      a -= quotient * b;
      std::swap(a, b);
    }
    if (inverse < 0) inverse += period;
    return static_cast<int64_t>(static_cast<__int128>(target / term.divisor % period) * inverse % period);
  }

  static constexpr int kMaxTerms = 2 * static_cast<int>(Footprint::kMaxDims) + 1;
  Term terms_[kMaxTerms + 1];
  int count_ = 0;
  int64_t work_ = 0;
};

/// Steps of the search, some 100 ns each, before the runs are listed.
constexpr int64_t kOverlapWork = 2000;

/// True where two arrays share a byte.
inline bool overlap(const Footprint& a, const Footprint& b, int64_t work = kOverlapWork) {
  if (a.empty() || b.empty() || a.end() <= b.begin() || b.end() <= a.begin()) return false;
  // Bytes of b are counted from its last one back, so that all steps are positive.
  BoundedSum sum;
  for (int64_t d = 0; d < a.dims(); ++d) {
    if (a.dim(d).stride > 0) sum.add(a.dim(d).stride, a.dim(d).size - 1);
  }
  for (int64_t d = 0; d < b.dims(); ++d) {
    if (b.dim(d).stride > 0) sum.add(b.dim(d).stride, b.dim(d).size - 1);
  }
  sum.add(1, a.run() + b.run() - 2);
  const BoundedSum::Answer answer = sum.reaches(static_cast<int64_t>(b.end() - 1 - a.begin()), work);
  if (answer != BoundedSum::Answer::kUnknown) return answer == BoundedSum::Answer::kYes;

  const uintptr_t from = std::max(a.begin(), b.begin()), to = std::min(a.end(), b.end());
  std::vector<uintptr_t> of_a = a.runs_between(from, to), of_b = b.runs_between(from, to);
  std::sort(of_a.begin(), of_a.end());
  std::sort(of_b.begin(), of_b.end());
  for (size_t i = 0, j = 0; i < of_a.size() && j < of_b.size();) {
    if (of_a[i] + static_cast<uintptr_t>(a.run()) <= of_b[j]) {
      ++i;
    } else if (of_b[j] + static_cast<uintptr_t>(b.run()) <= of_a[i]) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

/// True where an array holds one byte at two indices.
inline bool overlaps_itself(const Footprint& x, int64_t work = kOverlapWork) {
  if (x.empty()) return false;
  bool nested = true;
  int64_t extent = x.run(), runs = 1;
  for (int64_t d = 0; d < x.dims(); ++d) {
    const Footprint::Dim& dim = x.dim(d);
    if (dim.stride == 0) return true;
    nested = nested && dim.stride >= extent;
    extent += (dim.size - 1) * dim.stride;
    if (runs > extent / x.run() / dim.size) return true;  // more runs than have room
    runs *= dim.size;
  }
  if (nested) return false;
  // Two indices differ in some dimension as the last one, there by 1 .. size-1, in the smaller ones by
  // anything.
  bool unknown = false;
  for (int64_t last = 0; last < x.dims(); ++last) {
    BoundedSum sum;
    int64_t target = x.run() - 1 - x.dim(last).stride;
    for (int64_t d = 0; d < last; ++d) {
      sum.add(x.dim(d).stride, 2 * (x.dim(d).size - 1));
      target += (x.dim(d).size - 1) * x.dim(d).stride;
    }
    sum.add(x.dim(last).stride, x.dim(last).size - 2);
    sum.add(1, 2 * (x.run() - 1));
    const BoundedSum::Answer answer = sum.reaches(target, work);
    if (answer == BoundedSum::Answer::kYes) return true;
    unknown |= answer == BoundedSum::Answer::kUnknown;
  }
  if (!unknown) return false;
  std::vector<uintptr_t> runs_of_x = x.runs_between(x.begin(), x.end());
  std::sort(runs_of_x.begin(), runs_of_x.end());
  for (size_t i = 1; i < runs_of_x.size(); ++i) {
    if (runs_of_x[i - 1] + static_cast<uintptr_t>(x.run()) > runs_of_x[i]) return true;
  }
  return false;
}

}  // namespace lagkv
