// Work for several threads: tasks taken one by one from a common counter, so that a slow core takes fewer,
// and the scratch memory of every worker, allocated before any thread starts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace lagkv::cpu {

/// Waking a thread costs some microseconds: not for less than this.
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

/// Partitions of every head are cut in `runs` of `length` consecutive ones; each run is one task.
struct Runs {
  int64_t count, length;
};

/// As few runs as keep `workers` evenly busy: every run costs one more partition read, and threads that
/// finish together waste nothing.
inline Runs plan_runs(int64_t heads, int64_t partitions, int64_t workers) {
  Runs best{1, partitions};
  if (workers <= 1 || partitions <= 1) return best;
  const auto cost = [&](const Runs& runs) {
    return (heads * runs.count + workers - 1) / workers * (runs.length + 1);
  };
  const int64_t most = std::min(partitions, (4 * workers + heads - 1) / heads);
  for (int64_t count = 2; count <= most; ++count) {
    const int64_t length = (partitions + count - 1) / count;
    const Runs runs{(partitions + length - 1) / length, length};
    if (cost(runs) < cost(best)) best = runs;
  }
  return best;
}

/// An array of Real for each worker, on cache lines of its own.
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
