// The walk over a run of partitions of one head that every scoring operator shares.
#pragma once

#include <utility>

#include "params.h"
#include "tile.h"

namespace lagkv::cpu {

/// The partitions of key and value of one head.
template <class T>
struct HeadTiles {
  StridedRows<const T> key, value;
  int64_t batch, head, start, lag_size;

  /// Rows from `position` on as something to fetch.
  Ahead ahead(const StridedRows<const T>& x, int64_t position) const {
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(x.row(batch, head, position)), x.row_stride * size, x.dim * size};
  }
  int64_t first(int64_t partition) const { return start + partition * lag_size; }
};

/// What one worker needs to score: two references for each of key and value, and their statistics.
template <class Real>
struct WalkScratch {
  Real *key_now, *key_next, *value_now, *value_next, *key_statistic, *value_statistic;

  WalkScratch(Real* memory, int64_t key_dim, int64_t value_dim, int64_t lag_size)
      : key_now(memory),
        key_next(key_now + reference_size(key_dim)),
        value_now(key_next + reference_size(key_dim)),
        value_next(value_now + reference_size(value_dim)),
        key_statistic(value_next + reference_size(value_dim)),
        value_statistic(key_statistic + padded(lag_size)) {}

  static int64_t size(int64_t key_dim, int64_t value_dim, int64_t lag_size) {
    return 2 * (reference_size(key_dim) + reference_size(value_dim) + padded(lag_size));
  }
};

/// A tile and its neighbours stay in the L2 cache up to this size of one tile.
constexpr int64_t kCachedTileBytes = 128 * 1024;

/// Calls consume(partition, score) for the partitions begin .. end-1, each scored against the one after it.
///
/// Backward, the rows of a partition are read once: they are scored against the reference of the partition
/// after it and build their own. Forward, they are read twice, the second time from the cache; the partitions
/// up to `partition` may then be overwritten in `consume`. Both give the same scores.
///
/// Every pass over a tile fetches the tile that comes from memory next, `upcoming` after the last one:
/// hardware alone stops at the end of each page. Tiles beyond the cache fetch their own rows some way ahead.
template <class T, class Consume>
void walk(const HeadTiles<T>& head, const Method<T>& method, WalkScratch<RealOf<T>> scratch, int64_t begin,
          int64_t end, bool forward, double value_weight, Ahead upcoming, const Consume& consume) {
  const StridedRows<const T>&key = head.key, &value = head.value;
  const auto score = [&](int64_t partition) {
    method.score(scratch.key_statistic, scratch.value_statistic, head.lag_size, value_weight);
    consume(partition, scratch.key_statistic);
  };
  const auto tile = [&](const StridedRows<const T>& x, int64_t partition, Ahead next) {
    constexpr int64_t kAheadBytes = 16 * 1024;
    const int64_t row_bytes = x.dim * static_cast<int64_t>(sizeof(T));
    if (head.lag_size * row_bytes > kCachedTileBytes) {
      next = head.ahead(x, head.first(partition) + kAheadBytes / row_bytes + 4);
    }
    return Tile<T>{x.row(head.batch, head.head, head.first(partition)), x.row_stride, head.lag_size, x.dim,
                   next};
  };
  const auto rows = [&](const StridedRows<const T>& x, int64_t partition) {
    return head.ahead(x, head.first(partition));
  };

  if (forward) {
    for (int64_t p = begin; p < end; ++p) {
      const bool first = p == begin, last = p + 1 == end;
      method.reference(tile(key, p + 1, first ? rows(key, p) : Ahead{}), scratch.key_now);
      method.statistic(tile(key, p, rows(value, p + 1)), scratch.key_now, scratch.key_statistic);
      method.reference(tile(value, p + 1, first ? rows(value, p) : Ahead{}), scratch.value_now);
      method.statistic(tile(value, p, last ? upcoming : rows(key, p + 2)), scratch.value_now,
                       scratch.value_statistic);
      score(p);
    }
    return;
  }
  method.reference(tile(key, end, rows(value, end)), scratch.key_now);
  method.reference(tile(value, end, rows(key, end - 1)), scratch.value_now);
  for (int64_t p = end - 1; p > begin; --p) {
    method.advance(tile(key, p, rows(value, p)), scratch.key_now, scratch.key_statistic, scratch.key_next);
    method.advance(tile(value, p, rows(key, p - 1)), scratch.value_now, scratch.value_statistic,
                   scratch.value_next);
    std::swap(scratch.key_now, scratch.key_next);
    std::swap(scratch.value_now, scratch.value_next);
    score(p);
  }
  method.statistic(tile(key, begin, rows(value, begin)), scratch.key_now, scratch.key_statistic);
  method.statistic(tile(value, begin, upcoming), scratch.value_now, scratch.value_statistic);
  score(begin);
}

}  // namespace lagkv::cpu
