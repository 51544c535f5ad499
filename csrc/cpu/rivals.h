// One budget for a head: the scores of all its rows that compete for places, and the choice among them.
#pragma once

#include <algorithm>
#include <vector>

#include "batch.h"
#include "kernel_set.h"
#include "parallel.h"

namespace lagkv::cpu {

/// Holds for every head the scores that rows sink .. start-1 bring, then those of the partitions to
/// compress. As many rows are kept as there are earlier ones and `keep` for each partition.
template <class T>
class Rivals {
 public:
  using Real = RealOf<T>;

  /// `partitions`: to compress, of every sequence. Takes no memory where each has a budget of its own.
  Rivals(const Batch<T>& batch, const Kernels<T>& kernels, const std::vector<int64_t>& partitions)
      : p_(batch), kernels_(kernels), partitions_(partitions), scores_(1, place_heads()) {}

  /// Takes the scores of a partition.
  void add(const TaskList::Task& task, int64_t partition, const Real* score) const {
    std::copy_n(score, p_.lag_size, scores(task) + earlier(task.sequence) + partition * p_.lag_size);
  }

  /// Chooses among the rows of a head, all of whose partitions have been added. Positions of kept rows go to
  /// `index`, which is that of row `sink`, and their scores to the carried ones. Without partitions all are
  /// kept, and `index` is not written.
  void choose(const TaskList::Task& task, int32_t* index) const {
    const int64_t b = task.sequence, sink = sequence(b).sink, count = rivals(b);
    const int64_t keep = earlier(b) + partitions_[static_cast<size_t>(b)] * p_.keep;
    Real* const score = scores(task);
    if (!p_.carried.exists) {
      kernels_.select(score, count, keep, static_cast<int32_t>(sink), index);
      return;
    }
    const int64_t first = sink - p_.carried.first;
    const auto in = p_.carried.in.head(b, task.head);
    for (int64_t i = 0; i < earlier(b); ++i) score[i] = *in.row(first + i);
    const auto out = p_.carried.out.head(b, task.head);
    if (partitions_[static_cast<size_t>(b)] == 0) {
      for (int64_t i = 0; i < keep; ++i) *out.row(first + i) = score[i];
      return;
    }
    kernels_.select(score, count, keep, static_cast<int32_t>(sink), index);
    kernels_.restore(score, count);
    for (int64_t i = 0; i < keep; ++i) *out.row(first + i) = score[index[i] - sink];
  }

 private:
  const Sequence& sequence(int64_t b) const { return p_.sequences[static_cast<size_t>(b)]; }
  int64_t earlier(int64_t b) const { return sequence(b).first - sequence(b).sink; }
  int64_t rivals(int64_t b) const { return earlier(b) + partitions_[static_cast<size_t>(b)] * p_.lag_size; }

  Real* scores(const TaskList::Task& task) const {
    const int64_t b = task.sequence;
    return scores_.of(0) + places_[static_cast<size_t>(b)] + task.head * padded(rivals(b));
  }

  /// Finds the place of every sequence's scores; returns how many reals there are.
  int64_t place_heads() {
    int64_t reals = 0;
    for (int64_t b = 0; b < static_cast<int64_t>(p_.sequences.size()); ++b) {
      places_.push_back(reals);
      if (p_.method.budget == Budget::kHead) reals += p_.heads * padded(rivals(b));
    }
    return reals;
  }

  const Batch<T>& p_;
  const Kernels<T>& kernels_;
  const std::vector<int64_t>& partitions_;
  std::vector<int64_t> places_;
  Scratch<Real> scores_;
};

}  // namespace lagkv::cpu
