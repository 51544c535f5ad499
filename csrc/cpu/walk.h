// Walks over a run of partitions of one head and scores them: shared by every operator that scores.
#pragma once

#include <utility>
#include <vector>

#include "copy_rows.h"

namespace lagkv::cpu {

/// Up to this size of a tile, a tile and its neighbours fit the L2 cache.
constexpr int64_t kCachedTileBytes = 128 * 1024;

/// The partitions of key and value of one head. A partition that lies in several pages, or tiled, is
/// assembled in `memory` (copies_size(...) elements; null where there are no pages).
template <class T>
class HeadTiles {
 public:
  HeadTiles(const Rows<const T>& key, const Rows<const T>& value, int64_t start, int64_t lag_size, T* memory)
      : start_(start),
        lag_size_(lag_size),
        sides_{{key, memory}, {value, memory == nullptr ? nullptr : memory + 2 * lag_size * key.dim}} {}

  static int64_t copies_size(int64_t key_dim, int64_t value_dim, int64_t lag_size) {
    return 2 * lag_size * (key_dim + value_dim);
  }

  enum Side { kKey, kValue };

  int64_t lag_size() const { return lag_size_; }

  int64_t first(int64_t partition) const { return start_ + partition * lag_size_; }

  /// The rows of a partition, to be prefetched. For a partition in several pages the result is valid for
  /// kLists calls.
  Upcoming upcoming(Side side, int64_t partition) {
    const Rows<const T>& x = sides_[side].rows;
    if (x.is_tiled()) return {};
    if (x.together(first(partition), lag_size_) < lag_size_) return list_of(x, first(partition));
    return upcoming_from(x, first(partition));
  }

  Tile<T> tile(Side side, int64_t partition, Upcoming next) {
    const Rows<const T>& x = sides_[side].rows;
    const int64_t row_bytes = x.dim * static_cast<int64_t>(sizeof(T)), position = first(partition);
    if (x.is_tiled() || x.together(position, lag_size_) < lag_size_)
      return {copy_of(sides_[side], partition), x.dim, lag_size_, x.dim, next};
    if (lag_size_ * row_bytes > kCachedTileBytes && !x.is_paged())
      next = upcoming_from(x, position + kPrefetchBytes / row_bytes + 4);
    return {x.row(position), x.row_stride, lag_size_, x.dim, next};
  }

 private:
  static constexpr int64_t kPrefetchBytes = 16 * 1024;

  /// The last two assembled partitions: a forward walk reads each twice, with the next one in between.
  struct SideTiles {
    Rows<const T> rows;
    T* memory;
    int64_t held[2] = {-1, -1};
  };

  static Upcoming upcoming_from(const Rows<const T>& x, int64_t position) {
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(x.row(position)), x.row_stride * size, x.dim * size};
  }

  Upcoming list_of(const Rows<const T>& x, int64_t position) {
    std::vector<const char*>& list = lists_[latest_ = (latest_ + 1) % kLists];
    list.resize(static_cast<size_t>(lag_size_ + kUpcomingPadding));
    const char** next = list.data();
    for (int64_t i = 0, rows; i < lag_size_; i += rows) {
      rows = x.together(position + i, lag_size_ - i);
      const T* row = x.row(position + i);
      for (int64_t r = 0; r < rows; ++r) *next++ = reinterpret_cast<const char*>(row + r * x.row_stride);
    }
    std::fill_n(next, kUpcomingPadding, next[-1]);
    return {list[0], 0, x.dim * static_cast<int64_t>(sizeof(T)), list.data()};
  }

  const T* copy_of(SideTiles& side, int64_t partition) {
    const int64_t place = partition % 2, dim = side.rows.dim;
    const Rows<T> copy = strided_rows(side.memory + place * lag_size_ * dim, dim, dim);
    if (side.held[place] != partition) {
      copy_rows(side.rows, copy, first(partition), 0, lag_size_);
      side.held[place] = partition;
    }
    return copy.data;
  }

  static constexpr int kLists = 3;  // the walk prefetches a key and a value tile, and begins with one more
  std::vector<const char*> lists_[kLists];
  int latest_ = 0;
  int64_t start_, lag_size_;
  SideTiles sides_[2];
};

/// Scratch to score with: two references for each of key and value, their statistics, and what smoothing
/// needs.
template <class Real>
struct WalkScratch {
  Real *key_now, *key_next, *value_now, *value_next, *key_statistic, *value_statistic, *smoothing;

  WalkScratch(Real* memory, int64_t key_dim, int64_t value_dim, int64_t lag_size)
      : key_now(memory),
        key_next(key_now + reference_size(key_dim)),
        value_now(key_next + reference_size(key_dim)),
        value_next(value_now + reference_size(value_dim)),
        key_statistic(value_next + reference_size(value_dim)),
        value_statistic(key_statistic + statistic_size(lag_size)),
        smoothing(value_statistic + statistic_size(lag_size)) {}

  static int64_t size(int64_t key_dim, int64_t value_dim, int64_t lag_size, int64_t smooth) {
    return 2 * (reference_size(key_dim) + reference_size(value_dim) + statistic_size(lag_size)) +
           smoothing_size(lag_size, smooth);
  }
};

/// Calls consume(partition, score) for the partitions begin .. end-1, each scored against the one after it.
///
/// Backward, the rows of a partition are read once: they are scored against the reference of the partition
/// after it and build their own. Forward, they are read twice, the second time from the cache; the partitions
/// up to `partition` may then be overwritten in `consume`. Both give the same scores.
///
/// Every pass over a tile prefetches the tile that is read from memory next, and `upcoming` after the last
/// one: the hardware's prefetcher stops at the end of each memory page. A tile beyond the cache's size
/// prefetches its own rows.
template <class T, class Consume>
void walk(HeadTiles<T>& tiles, const Kernels<T>& all, const Method& method, WalkScratch<RealOf<T>> scratch,
          int64_t begin, int64_t end, bool forward, Upcoming upcoming, const Consume& consume) {
  const ScoreKernels<T>& kernels = all.of(method.score);
  constexpr auto key = HeadTiles<T>::kKey, value = HeadTiles<T>::kValue;
  const auto score = [&](int64_t partition) {
    kernels.score(scratch.key_statistic, scratch.value_statistic, tiles.lag_size(), method.value_weight);
    if (method.smooth > 1)
      all.smooth(scratch.key_statistic, tiles.lag_size(), method.smooth, scratch.smoothing);
    consume(partition, scratch.key_statistic);
  };

  if (forward) {
    // Prefetches half of large elements during the reference pass: memory is the bottleneck and must not
    // idle.
    const auto shared_lines = [](const Upcoming& upcoming) {
      return sizeof(T) < 4 ? 0 : upcoming.row_bytes / (2 * 64);
    };
    for (int64_t p = begin; p < end; ++p) {
      const bool first = p == begin;
      const Upcoming next_value = tiles.upcoming(value, p + 1);
      const Upcoming next_key = p + 1 == end ? upcoming : tiles.upcoming(key, p + 2);
      // In the first round the rows of both partitions are not in the cache yet.
      const int64_t value_lines = first ? 0 : shared_lines(next_value),
                    key_lines = first ? 0 : shared_lines(next_key);
      kernels.reference(
          tiles.tile(key, p + 1, first ? tiles.upcoming(key, p) : next_value.first(value_lines)),
          scratch.key_now);
      kernels.statistic(tiles.tile(key, p, next_value.after(value_lines)), scratch.key_now,
                        scratch.key_statistic);
      kernels.reference(
          tiles.tile(value, p + 1, first ? tiles.upcoming(value, p) : next_key.first(key_lines)),
          scratch.value_now);
      kernels.statistic(tiles.tile(value, p, next_key.after(key_lines)), scratch.value_now,
                        scratch.value_statistic);
      score(p);
    }
    return;
  }
  kernels.reference(tiles.tile(key, end, tiles.upcoming(value, end)), scratch.key_now);
  kernels.reference(tiles.tile(value, end, tiles.upcoming(key, end - 1)), scratch.value_now);
  for (int64_t p = end - 1; p > begin; --p) {
    kernels.advance(tiles.tile(key, p, tiles.upcoming(value, p)), scratch.key_now, scratch.key_statistic,
                    scratch.key_next);
    kernels.advance(tiles.tile(value, p, tiles.upcoming(key, p - 1)), scratch.value_now,
                    scratch.value_statistic, scratch.value_next);
    std::swap(scratch.key_now, scratch.key_next);
    std::swap(scratch.value_now, scratch.value_next);
    score(p);
  }
  kernels.statistic(tiles.tile(key, begin, tiles.upcoming(value, begin)), scratch.key_now,
                    scratch.key_statistic);
  kernels.statistic(tiles.tile(value, begin, upcoming), scratch.value_now, scratch.value_statistic);
  score(begin);
}

}  // namespace lagkv::cpu
