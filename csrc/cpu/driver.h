// Compresses a batch, dense or ragged: splits the work over threads, scores, selects and copies rows.
#pragma once

#include <algorithm>
#include <vector>

#include "batch.h"
#include "copy_rows.h"
#include "kernel_set.h"
#include "parallel.h"
#include "rivals.h"
#include "walk.h"

namespace lagkv::cpu {

template <class T>
class Driver {
 public:
  using Real = RealOf<T>;

  Driver(const Batch<T>& batch, const Kernels<T>& kernels) : p_(batch), kernels_(kernels) {
    for (const Sequence& s : p_.sequences) {
      const int64_t partitions = s.partitions;
      const int64_t moved = partitions > 0 ? s.after.first + s.after.count - s.sink : 0;
      partitions_.push_back(partitions);
      longest_ = std::max(longest_, partitions);
      all_partitions_ += p_.heads * partitions;
      compressed_heads_ += partitions > 0 ? p_.heads : 0;
      all_tokens_ += p_.heads * (s.before.count + moved);
      compressed_tokens_ += p_.heads * moved;
    }
  }

  /// Writes to outputs that are not the inputs.
  void copy() const {
    const int64_t bytes = all_tokens_ * row_bytes();
    const int64_t chunk = std::max<int64_t>(1, kCopyBytes / std::max<int64_t>(row_bytes(), 1));
    const auto chunks = [&](int64_t rows) { return (rows + chunk - 1) / chunk; };
    const auto before = [&](int64_t b) { return chunks(sequence(b).before.count); };
    const auto after = [&](int64_t b) { return chunks(sequence(b).after.count); };

    int64_t most_tasks = all_partitions_;
    for (int64_t b = 0; b < batch(); ++b) most_tasks += p_.heads * (before(b) + after(b));
    int64_t workers = worker_count(most_tasks, bytes);
    const int64_t run = run_length(partitions_, p_.heads, workers);
    const auto runs = [&](int64_t b) { return (partitions_[b] + run - 1) / run; };
    TaskList tasks;
    for (const int64_t b : longest_first()) {
      tasks.add(b, p_.heads, runs(b) + before(b) + after(b));
    }
    workers = std::min(workers, tasks.size());
    // Within the caches, writing in ascending order is faster; beyond them, reading once is.
    const bool forward = tile_bytes() <= kCachedTileBytes && bytes < kStreamBytes && !by_head();
    const Memory memory(*this, all_partitions_ == 0 ? 0 : workers);
    const Rivals<T> rivals(p_, kernels_, partitions_);
    run_tasks(tasks.size(), workers, [&](int64_t worker, int64_t i) {
      const TaskList::Task task = tasks[i];
      const int64_t b = task.sequence;
      int64_t part = task.part;
      if (part < runs(b)) {
        const Upcoming upcoming = first_of_task(tasks, i + workers, run, forward);
        return score_run(task, part * run, run, forward, memory, worker, true, upcoming, rivals);
      }
      part -= runs(b);
      const bool is_before = part < before(b);
      const Copied& rows = is_before ? sequence(b).before : sequence(b).after;
      part = (is_before ? part : part - before(b)) * chunk;
      copy_chunk(task, {rows.first + part, rows.first_out + part, std::min(chunk, rows.count - part)});
    });
    if (by_head()) copy_chosen(rivals, chunk, workers);
    fill_index(false);
  }

  /// Writes to the first rows of the inputs.
  void in_place() {
    const int64_t bytes = compressed_tokens_ * row_bytes();
    stream_ = bytes >= kStreamBytes;
    int64_t workers = worker_count(all_partitions_, bytes);
    const int64_t rounds = (compressed_heads_ + workers - 1) / workers;
    // One task a head, unless the longest head or the last round of heads leaves threads idle for a quarter
    // of the time.
    const bool heads_fill =
        4 * all_partitions_ >= 3 * workers * longest_ && 4 * compressed_heads_ >= 3 * rounds * workers;
    TaskList heads;
    for (const int64_t b : longest_first()) heads.add(b, p_.heads, partitions_[b] > 0 ? 1 : 0);
    const Rivals<T> rivals(p_, kernels_, partitions_);
    if (heads_fill && (by_head() || tile_bytes() <= kCachedTileBytes)) {
      workers = std::min(workers, compressed_heads_);
      const Memory memory(*this, workers);
      run_tasks(compressed_heads_, workers, [&](int64_t worker, int64_t i) {
        const TaskList::Task task = heads[i];
        const Upcoming upcoming = first_of_task(heads, i + workers, longest_, !by_head());
        score_run(task, 0, longest_, !by_head(), memory, worker, true, upcoming, rivals);
        if (by_head()) {
          choose(rivals, task);
          move_chosen(p_.key, p_.key_out, task);
          move_chosen(p_.value, p_.value_out, task);
        }
        if (stream_) kernels_.fence();
        copy_between(p_.key, p_.key_out, task, sequence(task.sequence).after);
        copy_between(p_.value, p_.value_out, task, sequence(task.sequence).after);
        fill_ends(task);
      });
      return fill_index(true);
    }
    // Otherwise runs of partitions are scored first, which moves nothing, then rows are moved.
    const int64_t run = run_length(partitions_, p_.heads, workers);
    TaskList runs;
    for (const int64_t b : longest_first()) runs.add(b, p_.heads, (partitions_[b] + run - 1) / run);
    workers = std::min(workers, runs.size());
    const Memory memory(*this, workers);
    run_tasks(runs.size(), workers, [&](int64_t worker, int64_t i) {
      const TaskList::Task task = runs[i];
      const Upcoming upcoming = first_of_task(runs, i + workers, run, false);
      score_run(task, task.part * run, run, false, memory, worker, false, upcoming, rivals);
    });
    if (by_head()) choose_all(rivals, heads, workers);
    run_tasks(2 * compressed_heads_, std::min(workers, 2 * compressed_heads_), [&](int64_t, int64_t i) {
      const TaskList::Task task = heads[i / 2];
      if (i % 2 == 0) fill_ends(task);
      const Rows<const T>& x = i % 2 ? p_.value : p_.key;
      const Rows<T>& out = i % 2 ? p_.value_out : p_.key_out;
      move_chosen(x, out, task);
      if (stream_) kernels_.fence();
      copy_between(x, out, task, sequence(task.sequence).after);
    });
    fill_index(true);
  }

 private:
  static constexpr int64_t kCopyBytes = 256 * 1024;
  /// Beyond the size of the caches, streaming stores are faster in place. A new output is still in the cache:
  /// the operating system has just cleared its pages.
  static constexpr int64_t kStreamBytes = 32 * 1024 * 1024;

  /// Scratch of every worker: to score, and to assemble partitions that lie in several pages.
  struct Memory {
    Scratch<Real> scratch;
    Scratch<T> copies;

    Memory(const Driver& c, int64_t workers)
        : scratch(workers,
                  WalkScratch<Real>::size(c.p_.key.dim, c.p_.value.dim, c.p_.lag_size, c.p_.method.smooth)),
          copies(workers, !c.p_.key.is_paged()
                              ? 0
                              : HeadTiles<T>::copies_size(c.p_.key.dim, c.p_.value.dim, c.p_.lag_size)) {}
  };

  bool by_head() const { return p_.method.budget == Budget::kHead; }

  int64_t batch() const { return static_cast<int64_t>(p_.sequences.size()); }
  const Sequence& sequence(int64_t b) const { return p_.sequences[static_cast<size_t>(b)]; }
  int64_t row_bytes() const { return (p_.key.dim + p_.value.dim) * static_cast<int64_t>(sizeof(T)); }
  int64_t tile_bytes() const {
    return p_.lag_size * std::max(p_.key.dim, p_.value.dim) * static_cast<int64_t>(sizeof(T));
  }
  int32_t* index(const TaskList::Task& task) const {
    return sequence(task.sequence).index + task.head * p_.index_head_stride;
  }

  /// Long sequences first: one begun last would keep a single thread busy at the end.
  std::vector<int64_t> longest_first() const {
    std::vector<int64_t> order(p_.sequences.size());
    for (size_t b = 0; b < order.size(); ++b) order[b] = static_cast<int64_t>(b);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return partitions_[a] > partitions_[b]; });
    return order;
  }

  HeadTiles<T> tiles_of(const TaskList::Task& task, T* memory) const {
    const int64_t b = task.sequence;
    return {p_.key.head(b, task.head), p_.value.head(b, task.head), sequence(b).first, p_.lag_size, memory};
  }

  /// The rows that task i reads first. A worker's next task is most likely `workers` tasks further.
  Upcoming first_of_task(const TaskList& tasks, int64_t i, int64_t run, bool forward) const {
    if (i >= tasks.size()) return {};
    const TaskList::Task task = tasks[i];
    const int64_t begin = task.part * run, partitions = partitions_[task.sequence];
    if (begin >= partitions || p_.key.is_paged()) return {};
    return tiles_of(task, nullptr)
        .upcoming(HeadTiles<T>::kKey, forward ? begin + 1 : std::min(begin + run, partitions));
  }

  static void iota(int32_t* out, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(first + i);
  }

  /// Scores the partitions begin .. begin+run-1 of a head. Where each has a budget of its own, selects their
  /// rows and, with `move`, copies these.
  void score_run(const TaskList::Task& task, int64_t begin, int64_t run, bool forward, const Memory& memory,
                 int64_t worker, bool move, Upcoming upcoming, const Rivals<T>& rivals) const {
    HeadTiles<T> tiles = tiles_of(task, memory.copies.of(worker));
    const int64_t end = std::min(begin + run, partitions_[task.sequence]);
    const Sequence& own = sequence(task.sequence);
    const WalkScratch<Real> scratch(memory.scratch.of(worker), p_.key.dim, p_.value.dim, p_.lag_size);
    walk(tiles, kernels_, p_.method, scratch, begin, end, forward, upcoming,
         [&](int64_t partition, Real* score) {
           if (by_head()) return rivals.add(task, partition, score);
           const int64_t first_out = own.first_out + partition * p_.keep;
           kernels_.select(score, p_.lag_size, p_.keep, static_cast<int32_t>(tiles.first(partition)),
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

  void choose(const Rivals<T>& rivals, const TaskList::Task& task) const {
    rivals.choose(task, index(task) + sequence(task.sequence).sink);
  }
  void choose_all(const Rivals<T>& rivals, const TaskList& heads, int64_t workers) const {
    run_tasks(heads.size(), std::min(workers, heads.size()),
              [&](int64_t, int64_t i) { choose(rivals, heads[i]); });
  }

  /// Chooses the rows of every head and copies them.
  void copy_chosen(const Rivals<T>& rivals, int64_t chunk, int64_t workers) const {
    const auto chosen = [&](int64_t b) { return sequence(b).after.first_out - sequence(b).sink; };
    TaskList heads, chunks;
    for (const int64_t b : longest_first()) {
      heads.add(b, p_.heads, partitions_[b] > 0 || p_.carried.exists ? 1 : 0);
      if (partitions_[b] == 0) continue;
      chunks.add(b, p_.heads, (chosen(b) + chunk - 1) / chunk);
    }
    choose_all(rivals, heads, workers);
    run_tasks(chunks.size(), std::min(workers, chunks.size()), [&](int64_t, int64_t i) {
      const TaskList::Task task = chunks[i];
      const int64_t b = task.sequence, from = task.part * chunk, first = sequence(b).sink + from;
      const int64_t count = std::min(chunk, chosen(b) - from);
      gather(p_.key, p_.key_out, task, first, count);
      gather(p_.value, p_.value_out, task, first, count);
    });
  }

  /// Copies the rows that the index names to the rows first .. first+count-1.
  void gather(const Rows<const T>& x, const Rows<T>& out, const TaskList::Task& task, int64_t first,
              int64_t count) const {
    gather_rows(kernels_, x.head(task.sequence, task.head), out.head(task.sequence, task.head),
                index(task) + first, first, count, stream_);
  }

  /// Moves the rows that a head's index names between the sink and the window.
  void move_chosen(const Rows<const T>& x, const Rows<T>& out, const TaskList::Task& task) const {
    const Sequence& own = sequence(task.sequence);
    gather(x, out, task, own.sink, own.after.first_out - own.sink);
  }

  /// Copies consecutive rows and writes their positions to the index.
  void copy_chunk(const TaskList::Task& task, const Copied& rows) const {
    iota(index(task) + rows.first_out, rows.first, rows.count);
    copy_between(p_.key, p_.key_out, task, rows);
    copy_between(p_.value, p_.value_out, task, rows);
  }

  void copy_between(const Rows<const T>& x, const Rows<T>& out, const TaskList::Task& task,
                    const Copied& rows) const {
    copy_rows(x.head(task.sequence, task.head), out.head(task.sequence, task.head), rows.first,
              rows.first_out, rows.count);
  }

  /// Writes the index of the rows before and after the compressed partitions.
  void fill_ends(const TaskList::Task& task) const {
    const Sequence& own = sequence(task.sequence);
    for (const Copied& rows : {own.before, own.after})
      iota(index(task) + rows.first_out, rows.first, rows.count);
  }

  /// Writes -1 past every new length and, with `whole`, the index of sequences that are not compressed.
  void fill_index(bool whole) const {
    TaskList tasks;
    int64_t numbers = 0;
    for (int64_t b = 0; b < batch(); ++b) {
      const int64_t filled = whole && partitions_[b] == 0 ? 0 : sequence(b).new_length();
      if (filled < sequence(b).index_size) tasks.add(b, p_.heads, 1);
      numbers += p_.heads * (sequence(b).index_size - filled);
    }
    const int64_t workers = worker_count(tasks.size(), numbers * static_cast<int64_t>(sizeof(int32_t)));
    run_tasks(tasks.size(), workers, [&](int64_t, int64_t i) {
      const TaskList::Task task = tasks[i];
      const Sequence& s = sequence(task.sequence);
      const int64_t rows = s.new_length();
      if (whole && partitions_[task.sequence] == 0) iota(index(task), 0, rows);
      std::fill(index(task) + rows, index(task) + s.index_size, -1);
    });
  }

  const Batch<T>& p_;
  const Kernels<T>& kernels_;
  std::vector<int64_t> partitions_;  // to compress, of every sequence; 0 where every row is kept
  int64_t longest_ = 0;              // the most of partitions_
  int64_t all_partitions_ = 0;       // of all heads of all sequences
  int64_t compressed_heads_ = 0;     // heads with partitions to compress
  int64_t all_tokens_ = 0, compressed_tokens_ = 0;
  bool stream_ = false;
};

}  // namespace lagkv::cpu
