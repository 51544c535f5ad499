// Single stages of `compress` as operators: the same kernels, each in its own loop over tasks.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernel_set.h"
#include "parallel.h"
#include "walk.h"

namespace lagkv::cpu {

template <class T>
void run_partition_bounds(const BoundsParams<T, RealOf<T>>& p, const Kernels<T>& kernels) {
  using Real = RealOf<T>;
  const int64_t partitions = partition_count(p.length, p.start, p.lag_size), dim = p.x.dim;
  const int64_t tasks = p.batch * p.heads * partitions;
  const int64_t workers = worker_count(tasks, tasks * p.lag_size * dim * static_cast<int64_t>(sizeof(T)));
  const Scratch<Real> scratch(workers, 2 * padded(dim));
  run_tasks(tasks, workers, [&](int64_t worker, int64_t task) {
    const int64_t head = task / partitions, partition = task % partitions;
    const T* rows = p.x.row(head / p.heads, head % p.heads, p.start + partition * p.lag_size);
    Real *lo = scratch.of(worker), *hi = lo + padded(dim);
    kernels.bounds({rows, p.x.row_stride, p.lag_size, dim, {}}, lo, hi);
    std::copy_n(lo, dim, p.bounds + 2 * task * dim);
    std::copy_n(hi, dim, p.bounds + (2 * task + 1) * dim);
  });
}

template <class T>
void run_lag_score(const ScoreParams<T, RealOf<T>>& p, const Kernels<T>& kernels) {
  using Real = RealOf<T>;
  const int64_t partitions = compressed_count(p.length, p.start, p.lag_size), heads = p.batch * p.heads;
  if (heads * partitions == 0) return;
  const int64_t row_bytes = (p.key.dim + p.value.dim) * static_cast<int64_t>(sizeof(T));
  int64_t workers = worker_count(heads * partitions, heads * p.length * row_bytes);
  const int64_t run = run_length({partitions}, heads, workers), runs = (partitions + run - 1) / run;
  workers = std::min(workers, heads * runs);
  const Scratch<Real> scratch(workers,
                              WalkScratch<Real>::size(p.key.dim, p.value.dim, p.lag_size, p.method.smooth));
  run_tasks(heads * runs, workers, [&](int64_t worker, int64_t task) {
    const int64_t head = task / runs, begin = task % runs * run, b = head / p.heads, h = head % p.heads;
    HeadTiles<T> tiles(p.key.head(b, h), p.value.head(b, h), p.start, p.lag_size, nullptr);
    const WalkScratch<Real> memory(scratch.of(worker), p.key.dim, p.value.dim, p.lag_size);
    walk(tiles, kernels, p.method, memory, begin, std::min(begin + run, partitions), false, {},
         [&](int64_t partition, const Real* score) {
           std::copy_n(score, p.lag_size, p.score + (head * partitions + partition) * p.lag_size);
         });
  });
}

template <class T>
void run_topk_index(const TopkParams<T>& p, const Kernels<T>& kernels) {
  using Real = RealOf<T>;
  const int64_t workers = worker_count(p.rows, p.rows * p.lag_size * static_cast<int64_t>(sizeof(T)));
  const int64_t chunk = std::max<int64_t>(1, std::min(p.rows / (4 * workers), kBytesPerWorker / p.lag_size));
  const Scratch<Real> scratch(workers, padded(p.lag_size));
  run_tasks((p.rows + chunk - 1) / chunk, workers, [&](int64_t worker, int64_t task) {
    for (int64_t i = task * chunk; i < std::min(p.rows, (task + 1) * chunk); ++i) {
      kernels.widen(p.score + p.places.offset(i), p.lag_size, scratch.of(worker));
      kernels.select(scratch.of(worker), p.lag_size, p.keep, 0, p.index + i * p.keep);
    }
  });
}

template <class T>
void run_compact(const CompactParams<T>& p, const Kernels<T>& kernels) {
  const int64_t row_bytes = p.x.dim * static_cast<int64_t>(sizeof(T));
  const int64_t heads = p.batch * p.heads;
  constexpr int64_t kRows = 128;
  const int64_t parts = (p.count + kRows - 1) / kRows;
  run_tasks(
      heads * parts, worker_count(heads * parts, heads * p.count * row_bytes), [&](int64_t, int64_t task) {
        const int64_t b = task / parts / p.heads, h = task / parts % p.heads, first = task % parts * kRows;
        const int64_t count = std::min(kRows, p.count - first);
        int32_t positions[kRows];
        for (int64_t i = 0; i < count; ++i) positions[i] = *p.index.row(b, h, first + i);
        kernels.gather(p.x.row(b, h, 0), p.x.row_stride, positions, 0, count, p.x.dim, p.out.row(b, h, first),
                       p.out.row_stride, false);
      });
}

}  // namespace lagkv::cpu
