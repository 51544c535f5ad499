// `compress` and `compress_`: how the work is split over threads, and where rows go.
#pragma once

#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "walk.h"

namespace lagkv::cpu {

template <class T>
class Compressor {
 public:
  using Real = RealOf<T>;

  Compressor(const CompressParams<T>& params, const Kernels<T>& kernels)
      : p_(params),
        kernels_(kernels),
        method_(params.score == Score::kStd ? kernels.std : kernels.cosine),
        partitions_(compressed_count(p_.length, p_.start, p_.lag_size)),
        out_length_(output_length(p_.length, p_.start, p_.lag_size, p_.keep)),
        heads_(p_.batch * p_.heads),
        window_(p_.start + partitions_ * p_.lag_size),
        window_out_(p_.start + partitions_ * p_.keep) {}

  /// Into outputs that are not the inputs.
  void copy() const {
    const bool all_kept = partitions_ == 0 || p_.keep == p_.lag_size;
    const int64_t row_bytes = (p_.key.dim + p_.value.dim) * static_cast<int64_t>(sizeof(T));
    const int64_t bytes = heads_ * p_.length * row_bytes;
    const int64_t chunk = std::max<int64_t>(1, kCopyBytes / std::max<int64_t>(row_bytes, 1));
    const int64_t prefix = all_kept ? p_.length : p_.start, window = all_kept ? 0 : p_.length - window_;
    const int64_t prefix_tasks = (prefix + chunk - 1) / chunk, window_tasks = (window + chunk - 1) / chunk;

    int64_t workers =
        worker_count(heads_ * (prefix_tasks + window_tasks + (all_kept ? 0 : partitions_)), bytes);
    const Runs runs = all_kept ? Runs{0, 0} : plan_runs(heads_, partitions_, workers);
    const int64_t tasks = runs.count + prefix_tasks + window_tasks;  // of one head
    workers = std::min(workers, heads_ * tasks);
    // In the cache it pays to write ascending, beyond it to read once.
    const bool forward = tile_bytes() <= kCachedTileBytes && bytes < kStreamBytes;
    const Scratch<Real> scratch(workers, all_kept ? 0 : scratch_size());
    run_tasks(heads_ * tasks, workers, [&](int64_t worker, int64_t task) {
      const int64_t head = task / tasks;
      int64_t part = task % tasks;
      if (part < runs.count) {
        const int64_t begin = part * runs.length, end = std::min(begin + runs.length, partitions_);
        const Ahead upcoming = first_of_task(task + workers, tasks, runs, forward);
        return score_run(head, begin, end, forward, scratch.of(worker), true, upcoming);
      }
      part -= runs.count;
      if (part < prefix_tasks)
        return copy_rows(head, part * chunk, part * chunk, std::min(chunk, prefix - part * chunk));
      part -= prefix_tasks;
      copy_rows(head, window_ + part * chunk, window_out_ + part * chunk,
                std::min(chunk, window - part * chunk));
    });
  }

  /// Into the first rows of the inputs.
  void in_place() {
    const int64_t row_bytes = (p_.key.dim + p_.value.dim) * static_cast<int64_t>(sizeof(T));
    if (partitions_ == 0 || p_.keep == p_.lag_size) {
      for (int64_t head = 0; head < heads_; ++head) iota(index(head), 0, p_.length);
      return;
    }
    const int64_t bytes = heads_ * (p_.length - p_.start) * row_bytes;
    stream_ = bytes >= kStreamBytes;
    int64_t workers = worker_count(heads_ * partitions_, bytes);
    const int64_t rounds = (heads_ + workers - 1) / workers;
    const bool heads_fill = 4 * heads_ >= 3 * rounds * workers;
    if (heads_fill && tile_bytes() <= kCachedTileBytes) {
      workers = std::min(workers, heads_);
      const Scratch<Real> scratch(workers, scratch_size());
      run_tasks(heads_, workers, [&](int64_t worker, int64_t head) {
        iota(index(head), 0, p_.start);
        const Ahead upcoming = first_of_task(head + workers, 1, {1, partitions_}, true);
        score_run(head, 0, partitions_, true, scratch.of(worker), true, upcoming);
        if (stream_) kernels_.fence();
        move_window(p_.key_out, head);
        move_window(p_.value_out, head);
        iota(index(head) + window_out_, window_, p_.length - window_);
      });
      return;
    }
    // Heads too few or partitions too large for the above: first the scores, which move nothing, then the
    // rows.
    const Runs runs = plan_runs(heads_, partitions_, workers);
    workers = std::min(workers, heads_ * runs.count);
    const Scratch<Real> scratch(workers, scratch_size());
    run_tasks(heads_ * runs.count, workers, [&](int64_t worker, int64_t task) {
      const int64_t begin = task % runs.count * runs.length, end = std::min(begin + runs.length, partitions_);
      const Ahead upcoming = first_of_task(task + workers, runs.count, runs, false);
      score_run(task / runs.count, begin, end, false, scratch.of(worker), false, upcoming);
    });
    run_tasks(2 * heads_, std::min(workers, 2 * heads_), [&](int64_t, int64_t task) {
      const int64_t head = task / 2;
      if (task % 2 == 0) {
        iota(index(head), 0, p_.start);
        iota(index(head) + window_out_, window_, p_.length - window_);
      }
      const StridedRows<T>& out = task % 2 ? p_.value_out : p_.key_out;
      gather_rows(task % 2 ? p_.value : p_.key, out, head, p_.start, partitions_ * p_.keep);
      if (stream_) kernels_.fence();
      move_window(out, head);
    });
  }

 private:
  static constexpr int64_t kCopyBytes = 256 * 1024;
  /// Beyond what caches hold, stores that do not read their lines first are faster: in place, that is; the
  /// pages of a new output are in the cache because the kernel has just cleared them.
  static constexpr int64_t kStreamBytes = 32 * 1024 * 1024;

  int64_t scratch_size() const { return WalkScratch<Real>::size(p_.key.dim, p_.value.dim, p_.lag_size); }
  int64_t tile_bytes() const {
    return p_.lag_size * std::max(p_.key.dim, p_.value.dim) * static_cast<int64_t>(sizeof(T));
  }
  int32_t* index(int64_t head) const { return p_.index + head * out_length_; }

  HeadTiles<T> tiles_of(int64_t head) const {
    return {p_.key, p_.value, head / p_.heads, head % p_.heads, p_.start, p_.lag_size};
  }

  /// The rows that the run of a task reads first. A worker's next task is most likely the one `workers`
  /// further.
  Ahead first_of_task(int64_t task, int64_t tasks, const Runs& runs, bool forward) const {
    const int64_t part = task % tasks;
    if (task >= heads_ * tasks || part >= runs.count) return {};
    const int64_t begin = part * runs.length, end = std::min(begin + runs.length, partitions_);
    const HeadTiles<T> tiles = tiles_of(task / tasks);
    return tiles.ahead(p_.key, tiles.first(forward ? begin + 1 : end));
  }

  static void iota(int32_t* out, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(first + i);
  }

  /// Selects in the partitions begin .. end-1 of a head and, with `move`, copies the rows selected.
  void score_run(int64_t head, int64_t begin, int64_t end, bool forward, Real* memory, bool move,
                 Ahead upcoming) const {
    const HeadTiles<T> tiles = tiles_of(head);
    const WalkScratch<Real> scratch(memory, p_.key.dim, p_.value.dim, p_.lag_size);
    walk(tiles, method_, scratch, begin, end, forward, p_.value_weight, upcoming,
         [&](int64_t partition, Real* score) {
           const int64_t first_out = p_.start + partition * p_.keep;
           kernels_.select(score, p_.lag_size, p_.keep,
                           static_cast<int32_t>(p_.start + partition * p_.lag_size), index(head) + first_out);
           if (!move) return;
           gather_rows(p_.key, p_.key_out, head, first_out, p_.keep);
           gather_rows(p_.value, p_.value_out, head, first_out, p_.keep);
         });
  }

  /// Output rows first_out .. first_out+count-1, whose input positions the index holds.
  void gather_rows(const StridedRows<const T>& x, const StridedRows<T>& out, int64_t head, int64_t first_out,
                   int64_t count) const {
    const int64_t b = head / p_.heads, h = head % p_.heads;
    kernels_.gather(x.row(b, h, 0), x.row_stride, index(head) + first_out, count, x.dim,
                    out.row(b, h, first_out), out.row_stride, stream_);
  }

  /// Consecutive input rows to consecutive output rows, and their positions to the index.
  void copy_rows(int64_t head, int64_t first, int64_t first_out, int64_t count) const {
    iota(index(head) + first_out, first, count);
    copy_block(p_.key, p_.key_out, head, first, first_out, count);
    copy_block(p_.value, p_.value_out, head, first, first_out, count);
  }

  void copy_block(const StridedRows<const T>& x, const StridedRows<T>& out, int64_t head, int64_t first,
                  int64_t first_out, int64_t count) const {
    const int64_t b = head / p_.heads, h = head % p_.heads;
    const auto bytes = static_cast<size_t>(x.dim) * sizeof(T);
    if (x.row_stride == x.dim && out.row_stride == out.dim) {
      std::memcpy(out.row(b, h, first_out), x.row(b, h, first), bytes * static_cast<size_t>(count));
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(out.row(b, h, first_out + i), x.row(b, h, first + i), bytes);
  }

  /// The last full partition and what follows it move down in their own buffer.
  void move_window(const StridedRows<T>& x, int64_t head) const {
    const int64_t b = head / p_.heads, h = head % p_.heads, count = p_.length - window_;
    const auto bytes = static_cast<size_t>(x.dim) * sizeof(T);
    if (x.row_stride == x.dim) {
      std::memmove(x.row(b, h, window_out_), x.row(b, h, window_), bytes * static_cast<size_t>(count));
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      std::memmove(x.row(b, h, window_out_ + i), x.row(b, h, window_ + i), bytes);
  }

  const CompressParams<T>& p_;
  const Kernels<T>& kernels_;
  const Method<T>& method_;
  const int64_t partitions_, out_length_, heads_, window_, window_out_;
  bool stream_ = false;
};

}  // namespace lagkv::cpu
