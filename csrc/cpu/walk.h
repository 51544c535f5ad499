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

  Tile<T> tile(const StridedRows<const T>& x, int64_t partition) const {
    return {x.row(batch, head, start + partition * lag_size), x.row_stride, lag_size, x.dim, {}};
  }
  Ahead ahead(const StridedRows<const T>& x, int64_t partition) const {
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(x.row(batch, head, start + partition * lag_size)),
            x.row_stride * size, x.dim * size};
  }
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

/// A tile and its neighbours stay in the L2 cache up to this size of one tile; larger ones are walked
/// backwards.
constexpr int64_t kForwardTileBytes = 128 * 1024;

/// Calls consume(partition, score) for the partitions begin .. end-1, each scored against the one after it.
///
/// Backward, the rows of a partition are read once: they are scored against the reference of the partition
/// after it and build their own. Forward, they are read twice, the second time from the cache; the partitions
/// up to `partition` may then be overwritten in `consume`. Both give the same scores.
template <class T, class Consume>
void walk(const HeadTiles<T>& head, const Method<T>& method, WalkScratch<RealOf<T>> scratch, int64_t begin,
          int64_t end, bool forward, double value_weight, const Consume& consume) {
  const auto score = [&](int64_t partition) {
    method.score(scratch.key_statistic, scratch.value_statistic, head.lag_size, value_weight);
    consume(partition, scratch.key_statistic);
  };
  const auto fetch = [&](const StridedRows<const T>& x, int64_t partition) {
    const bool inside = partition >= begin && partition <= end;
    const bool fits = head.lag_size * x.dim * static_cast<int64_t>(sizeof(T)) <= kForwardTileBytes;
    return inside && fits ? head.ahead(x, partition) : Ahead{};
  };

  if (forward) {
    for (int64_t p = begin; p < end; ++p) {
      Tile<T> key = head.tile(head.key, p), value = head.tile(head.value, p);
      key.ahead = fetch(head.value, p + 1);
      value.ahead = fetch(head.key, p + 2);
      method.reference(head.tile(head.key, p + 1), scratch.key_now);
      method.statistic(key, scratch.key_now, scratch.key_statistic);
      method.reference(head.tile(head.value, p + 1), scratch.value_now);
      method.statistic(value, scratch.value_now, scratch.value_statistic);
      score(p);
    }
    return;
  }
  method.reference(head.tile(head.key, end), scratch.key_now);
  method.reference(head.tile(head.value, end), scratch.value_now);
  for (int64_t p = end - 1; p >= begin; --p) {
    Tile<T> key = head.tile(head.key, p), value = head.tile(head.value, p);
    key.ahead = fetch(head.value, p);
    value.ahead = fetch(head.key, p - 1);
    if (p > begin) {
      method.advance(key, scratch.key_now, scratch.key_statistic, scratch.key_next);
      method.advance(value, scratch.value_now, scratch.value_statistic, scratch.value_next);
      std::swap(scratch.key_now, scratch.key_next);
      std::swap(scratch.value_now, scratch.value_next);
    } else {
      method.statistic(key, scratch.key_now, scratch.key_statistic);
      method.statistic(value, scratch.value_now, scratch.value_statistic);
    }
    score(p);
  }
}

}  // namespace lagkv::cpu
