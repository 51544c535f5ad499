// The driver of `compress`, `compress_` and the ragged operators: how the work is split over threads, and
// where rows go.
#pragma once

#include <cstring>

#include "batch.h"
#include "dispatch.h"
#include "parallel.h"
#include "walk.h"

namespace lagkv::cpu {

template <class T>
class Compressor {
 public:
  using Real = RealOf<T>;

  Compressor(const Batch<T>& batch, const Kernels<T>& kernels)
      : p_(batch), kernels_(kernels), method_(batch.score == Score::kStd ? kernels.std : kernels.cosine) {
    for (const Sequence& s : p_.sequences) {
      const int64_t partitions = p_.all_kept(s) ? 0 : s.partitions;
      partitions_.push_back(partitions);
      most_ = std::max(most_, partitions);
      runs_ += p_.heads * partitions;
      heads_ += partitions > 0 ? p_.heads : 0;
      tokens_ += p_.heads * s.length;
      compressed_tokens_ += partitions > 0 ? p_.heads * (s.length - s.start) : 0;
    }
  }

  /// Into outputs that are not the inputs.
  void copy() const {
    const int64_t bytes = tokens_ * row_bytes();
    const int64_t chunk = std::max<int64_t>(1, kCopyBytes / std::max<int64_t>(row_bytes(), 1));
    const auto chunks = [&](int64_t rows) { return (rows + chunk - 1) / chunk; };
    // Before and after the partitions: rows that stay as they are.
    const auto prefix = [&](int64_t b) { return partitions_[b] ? sequence(b).start : sequence(b).length; };
    const auto window = [&](int64_t b) { return partitions_[b] ? sequence(b).length - window_of(b) : 0; };

    int64_t most_tasks = runs_;
    for (int64_t b = 0; b < batch(); ++b) most_tasks += p_.heads * (chunks(prefix(b)) + chunks(window(b)));
    int64_t workers = worker_count(most_tasks, bytes);
    const int64_t run = run_length(partitions_, p_.heads, workers);
    const auto runs = [&](int64_t b) { return (partitions_[b] + run - 1) / run; };
    TaskList tasks;
    for (const int64_t b : longest_first()) {
      tasks.add(b, p_.heads, runs(b) + chunks(prefix(b)) + chunks(window(b)));
    }
    workers = std::min(workers, tasks.size());
    // In the cache it pays to write ascending, beyond it to read once.
    const bool forward = tile_bytes() <= kCachedTileBytes && bytes < kStreamBytes;
    const Memory memory(*this, runs_ == 0 ? 0 : workers);
    run_tasks(tasks.size(), workers, [&](int64_t worker, int64_t i) {
      const TaskList::Task task = tasks[i];
      const int64_t b = task.sequence;
      int64_t part = task.part;
      if (part < runs(b)) {
        const Ahead upcoming = first_of_task(tasks, i + workers, run, forward);
        return score_run(task, part * run, run, forward, memory, worker, true, upcoming);
      }
      part -= runs(b);
      if (part < chunks(prefix(b)))
        return copy_chunk(task, part * chunk, part * chunk, std::min(chunk, prefix(b) - part * chunk));
      part = (part - chunks(prefix(b))) * chunk;
      copy_chunk(task, window_of(b) + part, window_out_of(b) + part, std::min(chunk, window(b) - part));
    });
    fill_index(false);
  }

  /// Into the first rows of the inputs.
  void in_place() {
    const int64_t bytes = compressed_tokens_ * row_bytes();
    stream_ = bytes >= kStreamBytes;
    int64_t workers = worker_count(runs_, bytes);
    const int64_t rounds = (heads_ + workers - 1) / workers;
    // Neither the longest head nor the last round of heads may leave threads idle for more than a quarter.
    const bool heads_fill = 4 * runs_ >= 3 * workers * most_ && 4 * heads_ >= 3 * rounds * workers;
    TaskList heads;
    for (const int64_t b : longest_first()) heads.add(b, p_.heads, partitions_[b] > 0 ? 1 : 0);
    if (heads_fill && tile_bytes() <= kCachedTileBytes) {
      workers = std::min(workers, heads_);
      const Memory memory(*this, workers);
      run_tasks(heads_, workers, [&](int64_t worker, int64_t i) {
        const TaskList::Task task = heads[i];
        const Ahead upcoming = first_of_task(heads, i + workers, most_, true);
        score_run(task, 0, most_, true, memory, worker, true, upcoming);
        if (stream_) kernels_.fence();
        move_window(p_.key, p_.key_out, task);
        move_window(p_.value, p_.value_out, task);
        fill_ends(task);
      });
      return fill_index(true);
    }
    // Heads too few or too unequal, or partitions too large for the above: first the scores, which move
    // nothing, then the rows.
    const int64_t run = run_length(partitions_, p_.heads, workers);
    TaskList runs;
    for (const int64_t b : longest_first()) runs.add(b, p_.heads, (partitions_[b] + run - 1) / run);
    workers = std::min(workers, runs.size());
    const Memory memory(*this, workers);
    run_tasks(runs.size(), workers, [&](int64_t worker, int64_t i) {
      const TaskList::Task task = runs[i];
      const Ahead upcoming = first_of_task(runs, i + workers, run, false);
      score_run(task, task.part * run, run, false, memory, worker, false, upcoming);
    });
    run_tasks(2 * heads_, std::min(workers, 2 * heads_), [&](int64_t, int64_t i) {
      const TaskList::Task task = heads[i / 2];
      if (i % 2 == 0) fill_ends(task);
      const Rows<const T>& x = i % 2 ? p_.value : p_.key;
      const Rows<T>& out = i % 2 ? p_.value_out : p_.key_out;
      const int64_t first = sequence(task.sequence).start, count = partitions_[task.sequence] * p_.keep;
      gather_rows(kernels_, x.head(task.sequence, task.head), out.head(task.sequence, task.head),
                  index(task) + first, first, count, stream_);
      if (stream_) kernels_.fence();
      move_window(x, out, task);
    });
    fill_index(true);
  }

 private:
  static constexpr int64_t kCopyBytes = 256 * 1024;
  /// Beyond what caches hold, stores that do not read their lines first are faster: in place, that is; the
  /// pages of a new output are in the cache because the kernel has just cleared them.
  static constexpr int64_t kStreamBytes = 32 * 1024 * 1024;

  /// What every worker needs to score, and to put partitions together that lie in several pages.
  struct Memory {
    Scratch<Real> scratch;
    Scratch<T> copies;

    Memory(const Compressor& c, int64_t workers)
        : scratch(workers, WalkScratch<Real>::size(c.p_.key.dim, c.p_.value.dim, c.p_.lag_size)),
          copies(workers, !c.p_.key.is_paged()
                              ? 0
                              : HeadTiles<T>::copies_size(c.p_.key.dim, c.p_.value.dim, c.p_.lag_size)) {}
  };

  int64_t batch() const { return static_cast<int64_t>(p_.sequences.size()); }
  const Sequence& sequence(int64_t b) const { return p_.sequences[static_cast<size_t>(b)]; }
  int64_t window_of(int64_t b) const { return sequence(b).start + partitions_[b] * p_.lag_size; }
  int64_t window_out_of(int64_t b) const { return sequence(b).start + partitions_[b] * p_.keep; }
  int64_t row_bytes() const { return (p_.key.dim + p_.value.dim) * static_cast<int64_t>(sizeof(T)); }
  int64_t tile_bytes() const {
    return p_.lag_size * std::max(p_.key.dim, p_.value.dim) * static_cast<int64_t>(sizeof(T));
  }
  int32_t* index(const TaskList::Task& task) const {
    return sequence(task.sequence).index + task.head * p_.index_head_stride;
  }

  /// A long sequence begun last would keep one thread busy while the others have none left.
  std::vector<int64_t> longest_first() const {
    std::vector<int64_t> order(p_.sequences.size());
    for (size_t b = 0; b < order.size(); ++b) order[b] = static_cast<int64_t>(b);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return partitions_[a] > partitions_[b]; });
    return order;
  }

  HeadTiles<T> tiles_of(const TaskList::Task& task, T* memory) const {
    const int64_t b = task.sequence;
    return {p_.key.head(b, task.head), p_.value.head(b, task.head), sequence(b).start, p_.lag_size, memory};
  }

  /// The rows that the run of a task reads first. A worker's next task is most likely the one `workers`
  /// further.
  Ahead first_of_task(const TaskList& tasks, int64_t i, int64_t run, bool forward) const {
    if (i >= tasks.size()) return {};
    const TaskList::Task task = tasks[i];
    const int64_t begin = task.part * run, partitions = partitions_[task.sequence];
    if (begin >= partitions || p_.key.is_paged()) return {};
    return tiles_of(task, nullptr)
        .ahead(HeadTiles<T>::kKey, forward ? begin + 1 : std::min(begin + run, partitions));
  }

  static void iota(int32_t* out, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(first + i);
  }

  /// Selects in the partitions begin .. begin+run-1 of a head and, with `move`, copies the rows selected.
  void score_run(const TaskList::Task& task, int64_t begin, int64_t run, bool forward, const Memory& memory,
                 int64_t worker, bool move, Ahead upcoming) const {
    HeadTiles<T> tiles = tiles_of(task, memory.copies.of(worker));
    const int64_t end = std::min(begin + run, partitions_[task.sequence]);
    const int64_t start = sequence(task.sequence).start;
    const WalkScratch<Real> scratch(memory.scratch.of(worker), p_.key.dim, p_.value.dim, p_.lag_size);
    walk(tiles, method_, scratch, begin, end, forward, p_.value_weight, upcoming,
         [&](int64_t partition, Real* score) {
           const int64_t first_out = start + partition * p_.keep;
           kernels_.select(score, p_.lag_size, p_.keep, static_cast<int32_t>(start + partition * p_.lag_size),
                           index(task) + first_out);
           if (!move) return;
           for (const auto side : {HeadTiles<T>::kKey, HeadTiles<T>::kValue}) {
             const Tile<T> tile = tiles.tile(side, partition, {});
             const Rows<T> out =
                 (side == HeadTiles<T>::kKey ? p_.key_out : p_.value_out).head(task.sequence, task.head);
             gather_rows(kernels_, tile.rows, tile.row_stride, tiles.first(partition), out,
                         index(task) + first_out, first_out, p_.keep, stream_);
           }
         });
  }

  /// Consecutive input rows to consecutive output rows, and their positions to the index.
  void copy_chunk(const TaskList::Task& task, int64_t first, int64_t first_out, int64_t count) const {
    iota(index(task) + first_out, first, count);
    copy_between(p_.key, p_.key_out, task, first, first_out, count);
    copy_between(p_.value, p_.value_out, task, first, first_out, count);
  }

  void copy_between(const Rows<const T>& x, const Rows<T>& out, const TaskList::Task& task, int64_t first,
                    int64_t first_out, int64_t count) const {
    copy_rows(x.head(task.sequence, task.head), out.head(task.sequence, task.head), first, first_out, count);
  }

  /// The last full partition and what follows it move down.
  void move_window(const Rows<const T>& x, const Rows<T>& out, const TaskList::Task& task) const {
    const int64_t b = task.sequence, window = window_of(b);
    copy_between(x, out, task, window, window_out_of(b), sequence(b).length - window);
  }

  /// The index of the rows before and after the partitions.
  void fill_ends(const TaskList::Task& task) const {
    const int64_t b = task.sequence;
    iota(index(task), 0, sequence(b).start);
    iota(index(task) + window_out_of(b), window_of(b), sequence(b).length - window_of(b));
  }

  /// The index of sequences that stay as they are (with `whole`), and what lies past the new length of any.
  void fill_index(bool whole) const {
    TaskList tasks;
    int64_t numbers = 0;
    for (int64_t b = 0; b < batch(); ++b) {
      const int64_t filled = whole && partitions_[b] == 0 ? 0 : p_.new_length(sequence(b));
      if (filled < sequence(b).index_size) tasks.add(b, p_.heads, 1);
      numbers += p_.heads * (sequence(b).index_size - filled);
    }
    const int64_t workers = worker_count(tasks.size(), numbers * static_cast<int64_t>(sizeof(int32_t)));
    run_tasks(tasks.size(), workers, [&](int64_t, int64_t i) {
      const TaskList::Task task = tasks[i];
      const Sequence& s = sequence(task.sequence);
      const int64_t rows = p_.new_length(s);
      if (whole && partitions_[task.sequence] == 0) iota(index(task), 0, rows);
      std::fill(index(task) + rows, index(task) + s.index_size, -1);
    });
  }

  const Batch<T>& p_;
  const Kernels<T>& kernels_;
  const Method<T>& method_;
  std::vector<int64_t> partitions_;  // of every sequence that lose tokens; 0 where every row stays
  int64_t most_ = 0;                 // of partitions_
  int64_t runs_ = 0, heads_ = 0;     // of all sequences: partitions, and heads that have any
  int64_t tokens_ = 0, compressed_tokens_ = 0;
  bool stream_ = false;
};

}  // namespace lagkv::cpu
