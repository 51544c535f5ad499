// The launch planner: how many blocks, which rows a block takes and how much memory the launch needs, from
// the shape and the device. Plain C++, no torch, no CUDA: the launchers and the executor's bindings ask the
// same functions.
#pragma once

#include <stdexcept>
#include <string>

#include "storage.h"

namespace lagkv::cuda {

constexpr int64_t kMaxGrid = 2147483647;  // blocks of one launch

/// The grid of a kernel of so many blocks. No cache of a real model needs more than CUDA launches at once.
inline int64_t grid_of(int64_t blocks) {
  if (blocks > kMaxGrid) {
    throw std::runtime_error("lagkv: tensors of these shapes take " + std::to_string(blocks) +
                             " thread blocks, CUDA launches at most " + std::to_string(kMaxGrid));
  }
  return blocks;
}

/// Chooses the length of runs: every run reads one partition more than it scores, so long runs
/// move fewer bytes, while short ones fill the machine. Cost = rounds of blocks x rows that one block moves.
inline int64_t run_length(int64_t heads, int64_t partitions, int64_t lag_size, int64_t keep,
                          int64_t concurrent) {
  int64_t best = 1, best_cost = -1;
  for (int64_t rounds = 1; rounds <= 64; ++rounds) {
    const int64_t runs =
        std::max<int64_t>(1, std::min(partitions, rounds * concurrent / std::max<int64_t>(1, heads)));
    const int64_t run = ceil_div(partitions, runs);
    const int64_t cost =
        ceil_div(heads * ceil_div(partitions, run), concurrent) * (run * (lag_size + keep) + lag_size);
    if (best_cost < 0 || cost < best_cost) {
      best = run;
      best_cost = cost;
    }
    if (run == 1) break;
  }
  return best;
}

/// The launch of compress, compress_ and lag_score.
struct CompressPlan {
  RowShape shape;
  Storage storage;
  int64_t partitions;             // that lose rows; 0 where nothing is to be scored
  int64_t run, runs, run_blocks;  // partitions per run, runs per head, blocks that score
  int64_t copy_blocks;            // blocks that copy the rows before and after the compressed partitions
  int64_t copy_tiles;             // of them per head
  int64_t blocks;
  int64_t scratch_bytes;  // of the whole launch
};

/// keep = lag_size loses nothing: then nothing is scored unless the scores themselves are wanted. `outside`:
/// the rows before and after the partitions are wanted too.
inline CompressPlan plan_compress(RowShape shape, int element_size, int64_t key_dim, int64_t value_dim,
                                  int64_t heads, int64_t length, int64_t start, int64_t lag_size,
                                  int64_t keep, bool scores_wanted, bool outside, const Device& device,
                                  bool blend = false) {
  CompressPlan plan{};
  plan.shape = shape;
  plan.partitions = keep < lag_size || scores_wanted ? compressed_count(length, start, lag_size) : 0;
  if (heads > 0 && plan.partitions > 0) {
    plan.storage = plan_storage(shape, element_size, key_dim, value_dim, lag_size, false, device, blend);
    const int64_t concurrent =
        device.multiprocessors *
        planned_blocks(shape, element_size, plan.storage.shared_bytes, false, device, blend);
    plan.run = run_length(heads, plan.partitions, lag_size, keep, concurrent);
    plan.runs = ceil_div(plan.partitions, plan.run);
    plan.run_blocks = heads * plan.runs;
  }
  if (outside) {
    plan.copy_tiles = ceil_div(length - plan.partitions * lag_size, kCopyRows);
    plan.copy_blocks = heads * plan.copy_tiles;
  }
  plan.blocks = plan.run_blocks + plan.copy_blocks;
  plan.scratch_bytes = plan.run_blocks * plan.storage.scratch_bytes;
  return plan;
}

/// The launch of partition_bounds: a block per partition and head.
struct BoundsPlan {
  RowShape shape;
  int64_t partitions, blocks, shared_bytes;
};

inline BoundsPlan plan_bounds(RowShape shape, int element_size, int64_t dim, int64_t heads, int64_t length,
                              int64_t start, int64_t lag_size) {
  BoundsPlan plan{};
  plan.shape = shape;
  plan.partitions = partition_count(length, start, lag_size);
  plan.blocks = dim > 0 ? heads * plan.partitions : 0;
  plan.shared_bytes = shape.wide() ? 16 : kThreads / 32 * 2 * dim * element_size;  // the kernel names it
  return plan;
}

/// The launch of topk_index: a block per row of scores, which it holds in shared memory where they fit.
struct TopkPlan {
  int64_t shared_bytes;  // 0: scores are read from global memory in every pass
};

inline TopkPlan plan_topk(int bits_size, int64_t lag_size, const Device& device) {
  const int64_t bytes = padded_lag(lag_size) * bits_size;
  return {bytes <= device.shared_per_block - 2048 ? bytes : 0};
}

/// The launch of compact: a block per kCopyRows gathered rows of one head.
struct CompactPlan {
  int64_t tiles, blocks;
};

inline CompactPlan plan_compact(int64_t heads, int64_t count, int64_t dim) {
  const int64_t tiles = ceil_div(count, kCopyRows), blocks = dim > 0 ? heads * tiles : 0;
  return {tiles, blocks};
}

/// The columns of a row in slices, in accesses. Rows move down within their head; slices are independent, so
/// a block takes one slice of one head and walks it in ascending order: no block ever waits for another.
struct MoveSlices {
  int64_t slice;  // accesses per row that a block takes
  int64_t key_slices, value_slices;

  LAGKV_HOST_DEVICE int64_t count() const { return key_slices + value_slices; }
};

/// Slices so narrow that `heads` heads make `blocks` blocks; the narrowest is a 32-byte sector.
LAGKV_HOST_DEVICE MoveSlices move_slices(int access_bytes, int64_t key_columns, int64_t value_columns,
                                         int64_t heads, int64_t blocks) {
  const auto larger_of = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t narrowest = larger_of(1, 32 / access_bytes);
  const int64_t wanted = larger_of(1, blocks / larger_of(1, 2 * heads));
  const int64_t columns = larger_of(1, larger_of(key_columns, value_columns));
  int64_t slice = round_up(ceil_div(columns, wanted), narrowest);
  if (slice > kMoveThreads) slice = kMoveThreads;  // a block also needs at least one row per pass
  return {slice, ceil_div(key_columns, slice), ceil_div(value_columns, slice)};
}

/// Blocks that fill a machine with moves.
inline int64_t move_blocks(const Device& device) { return 2 * device.multiprocessors; }

/// The launch of compress_'s second step.
struct MovePlan {
  int64_t first, rows;  // output rows [first, rows) move
  MoveSlices slices;
  int64_t blocks;
};

inline MovePlan plan_move(int access_bytes, int64_t key_columns, int64_t value_columns, int64_t heads,
                          int64_t first, int64_t rows, const Device& device) {
  const MoveSlices slices = move_slices(access_bytes, key_columns, value_columns, heads, move_blocks(device));
  return {first, rows, slices, first < rows ? heads * slices.count() : 0};
}

/// The launch of the ragged kernels: from capacities alone, the lengths are the device's.
struct RaggedPlan {
  RowShape shape;
  Storage storage;
  int64_t concurrent;  // scoring blocks that the device holds at a time: what the schedule aims at
  int64_t blocks;      // of the scoring kernel: they go through however many jobs there are
  int64_t tile;        // entries of the index that a job fills
  int64_t scratch_bytes;
};

/// `rows`: tokens of all sequences at most.
inline RaggedPlan plan_ragged(RowShape shape, int element_size, int64_t key_dim, int64_t value_dim,
                              int64_t batch, int64_t heads, int64_t rows, int64_t lag_size, int64_t keep,
                              bool packed, const Device& device, bool scores_wanted = false,
                              bool blend = false) {
  RaggedPlan plan{};
  plan.shape = shape;
  plan.storage = plan_storage(shape, element_size, key_dim, value_dim, lag_size, true, device, blend);
  plan.concurrent = device.multiprocessors *
                    planned_blocks(shape, element_size, plan.storage.shared_bytes, true, device, blend);
  plan.tile = packed ? kCopyRows : kIndexTile;
  // Packed rows have one tile more: what follows the last sequence.
  const int64_t partitions = keep < lag_size || scores_wanted ? rows / lag_size : 0;
  const int64_t jobs = heads * (partitions + rows / plan.tile + batch + (packed ? 1 : 0));
  plan.blocks = std::min(plan.concurrent, std::max<int64_t>(jobs, 1));
  plan.scratch_bytes = plan.blocks * plan.storage.scratch_bytes;
  return plan;
}

/// The launch of compress_blocks: from the room in the target tables alone, the numbers are the device's.
struct BlocksPlan {
  RowShape shape;
  Storage storage;
  int64_t run, runs, run_blocks;  // partitions per run, runs per head, blocks that score
  int64_t blocks;                 // and one per head for its mixed block
  int64_t scratch_bytes;          // of the whole launch
};

/// `heads`: of all sequences; `capacity`: target rows of a sequence.
inline BlocksPlan plan_blocks(RowShape shape, int element_size, int64_t key_dim, int64_t value_dim,
                              int64_t heads, int64_t capacity, int64_t lag_size, int64_t keep,
                              const Device& device, bool blend = false) {
  BlocksPlan plan{};
  plan.shape = shape;
  plan.storage = plan_storage(shape, element_size, key_dim, value_dim, lag_size, true, device, blend);
  const int64_t concurrent =
      device.multiprocessors *
      planned_blocks(shape, element_size, plan.storage.shared_bytes, true, device, blend);
  const int64_t partitions = std::max<int64_t>(1, capacity / keep);
  plan.run = run_length(heads, partitions, lag_size, keep, concurrent);
  plan.runs = ceil_div(partitions, plan.run);
  plan.run_blocks = heads * plan.runs;
  plan.blocks = plan.run_blocks + heads;
  plan.scratch_bytes = plan.run_blocks * plan.storage.scratch_bytes;
  return plan;
}

}  // namespace lagkv::cuda
