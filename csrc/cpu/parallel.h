// Runs tasks on several threads. Tasks are taken from a common counter, so that a slow core takes fewer;
// scratch memory is allocated before any thread starts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace lagkv::cpu {

/// The least work that is worth waking a thread, which takes some microseconds.
constexpr int64_t kBytesPerWorker = 256 * 1024;

/// Threads worth using for `tasks` that read `bytes` together.
inline int64_t worker_count(int64_t tasks, int64_t bytes) {
  const int64_t useful = std::min(tasks, bytes / kBytesPerWorker);
  return useful <= 1 ? 1 : std::min<int64_t>(useful, torch::stable::get_num_threads());
}

/// Calls task(worker, i) for i in 0 .. tasks-1, in order within a worker. A task must not throw: an exception
/// would be lost between the threads.
template <class Task>
void run_tasks(int64_t tasks, int64_t workers, const Task& task) {
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(0, i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(worker, i);
  });
}

/// Partitions of a run: each head's partitions are split into runs of consecutive ones, one task each. Every
/// run reads one more partition, so there are as few as keep all workers equally busy. `partitions` holds the
/// count of every sequence, of which each has `heads` heads.
inline int64_t run_length(const std::vector<int64_t>& partitions, int64_t heads, int64_t workers) {
  int64_t most = 1, total = 0;
  for (const int64_t count : partitions) most = std::max(most, count), total += heads * count;
  if (workers <= 1 || most <= 1) return most;
  const auto cost = [&](int64_t length) {
    int64_t tasks = 0;
    for (const int64_t count : partitions) tasks += heads * ((count + length - 1) / length);
    const int64_t rounds = (tasks + workers - 1) / workers;
    return std::max<double>(static_cast<double>(length + 1),
                            static_cast<double>(rounds * (total + tasks)) / static_cast<double>(tasks));
  };
  int64_t best = most;
  const int64_t runs = std::min(most, (4 * workers * most + total - 1) / total);
  for (int64_t count = 2; count <= runs; ++count) {
    const int64_t length = (most + count - 1) / count;
    if (cost(length) < cost(best)) best = length;
  }
  return best;
}

/// Tasks of all heads of all sequences, numbered consecutively.
class TaskList {
 public:
  struct Task {
    int64_t sequence, head, part;
  };

  /// Adds `parts` tasks for each of `heads` heads.
  void add(int64_t sequence, int64_t heads, int64_t parts) {
    if (heads * parts == 0) return;
    groups_.push_back({size_, sequence, parts});
    size_ += heads * parts;
  }

  int64_t size() const { return size_; }

  Task operator[](int64_t i) const {
    const auto after = [](int64_t task, const Group& group) { return task < group.first; };
    const Group& group = *(std::upper_bound(groups_.begin(), groups_.end(), i, after) - 1);
    i -= group.first;
    return {group.sequence, i / group.parts, i % group.parts};
  }

 private:
  struct Group {
    int64_t first, sequence, parts;
  };
  std::vector<Group> groups_;
  int64_t size_ = 0;
};

/// An array of Real for each worker, none on a cache line of another's.
template <class Real>
class Scratch {
 public:
  Scratch(int64_t workers, int64_t reals)
      : stride_((reals * static_cast<int64_t>(sizeof(Real)) + 127) / 128 * 128),
        memory_(new char[static_cast<size_t>(workers * stride_ + 128)]) {}

  Real* of(int64_t worker) const {
    const auto base = (reinterpret_cast<uintptr_t>(memory_.get()) + 127) / 128 * 128;
    return reinterpret_cast<Real*>(base + static_cast<uintptr_t>(worker * stride_));
  }

 private:
  int64_t stride_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace lagkv::cpu
