// The launch planner: how many threads, which rows a block takes and how much memory it needs, from the
// shape and the device. Plain C++, no torch, no CUDA: the launchers and the executor's bindings ask the same
// functions.
//
// The number of threads and the way lanes share a row depend on dtype, D and alignment alone, never on B, H,
// N or the device: a partition's scores are bit for bit the same in every batch, on every card.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../params.h"

namespace lagkv::cuda {

constexpr int kThreads = 256;  // of every kernel but move_rows
constexpr int kMoveThreads = 512;
constexpr int kMoveVectors = 8;        // accesses in flight per thread of move_rows
constexpr int kRaggedMoveVectors = 4;  // fewer where every access has a look-up of its own: registers
constexpr int64_t kScalarDim = 256;    // widest row of the element-wise layout
constexpr int64_t kBlendDim = 240;     // widest float64 row of a blend whose references fit in shared memory
constexpr int64_t kCopyRows = 64;      // rows of key and value that one copying block takes
constexpr int64_t kIndexTile = 1024;   // entries of the index that one block of the ragged kernels fills
constexpr int64_t kMaxGrid = 2147483647;  // blocks of one launch

/// Resources that a launch may use. The defaults are those that every architecture since sm_80 has.
struct Device {
  int64_t multiprocessors = 108;
  int64_t shared_per_block = 48 * 1024;
  int64_t shared_per_multiprocessor = 164 * 1024;
};

/// The grid of a kernel of so many blocks. No cache of a real model needs more than CUDA launches at once.
inline int64_t grid_of(int64_t blocks) {
  if (blocks > kMaxGrid) {
    throw std::runtime_error("lagkv: tensors of these shapes take " + std::to_string(blocks) +
                             " thread blocks, CUDA launches at most " + std::to_string(kMaxGrid));
  }
  return blocks;
}

/// Layout of a row of D elements over the lanes of a warp: `chunks` accesses of `elements` elements for each
/// of `lanes` lanes. elements = 0 is the wide layout: rows of any length, read several times.
struct RowShape {
  int32_t elements, lanes, chunks;
  LAGKV_HOST_DEVICE bool wide() const { return elements == 0; }
};

/// Blocks of compress_kernel per multiprocessor that its registers must allow (__launch_bounds__). Most
/// registers hold a lane's channels: lo and scale in arithmetic's type, minimum and maximum as stored. The
/// ragged kernel needs a few more for where rows lie.
LAGKV_HOST_DEVICE constexpr int blocks_per_multiprocessor(RowShape shape, int element_size, bool ragged) {
  if (shape.elements <= 1) return shape.elements == 1 && element_size == 8 ? 1 : 2;
  const int real = element_size == 8 ? 8 : 4;
  const int state = shape.elements * shape.chunks * 2 * (real + element_size);
  return state <= (element_size == 8 ? 64 : ragged ? 112 : 128) ? 3 : 2;
}

/// The same of a kernel that scores a blend, whose two passes in one kernel need a few registers more.
LAGKV_HOST_DEVICE constexpr int blend_blocks(int blocks) { return blocks < 2 ? blocks : 2; }

inline RowShape row_shape(int element_size, int64_t dim, bool aligned, bool blend = false) {
  const int elements = 16 / element_size;
  if (dim < 1 || (blend && element_size == 8 && dim > kBlendDim)) return {0, 0, 0};
  if (aligned && dim % elements == 0) {
    const int64_t vectors = dim / elements;
    // Fewest lanes that have an instantiation: 8 for 16-bit types, 16 for float32, 32 for float64 (D = 64).
    for (int lanes = 4 * element_size; lanes <= 32; lanes *= 2) {
      if (vectors <= lanes) return {elements, lanes, 1};
    }
    if (vectors <= 64) return {elements, 32, 2};
    if (vectors <= 128 && element_size == 8) return {elements, 32, 4};
  }
  if (dim <= kScalarDim) return {1, 32, 8};
  return {0, 0, 0};
}

/// True where every row of a tensor starts at a multiple of 16 bytes.
template <class T>
bool rows_aligned(const Rows<T>& rows) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.block_stride % kElements == 0 &&
         rows.head_stride % kElements == 0 && rows.row_stride % kElements == 0;
}

LAGKV_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LAGKV_HOST_DEVICE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// Statistics of one tensor's partition, padded so that scores can be read four at a time.
LAGKV_HOST_DEVICE int64_t padded_lag(int64_t lag_size) { return (lag_size + 3) / 4 * 4; }

/// Dynamic shared memory of the scoring kernels, offsets in bytes; what does not fit goes to scratch in
/// global memory.
struct Storage {
  int64_t key_reference;    // [3, Dk] Real: lo, hi, scale of the next partition (cosine: anchor in the first
                            // Dk; blend: [4, Dk], the anchor last)
  int64_t value_reference;  // [3 or 4, Dv] Real
  int64_t partial;     // [warps, 2, max D] T or [warps, max D] Real: each warp's share of the next reference
  int64_t statistics;  // [2, padded_lag] Real: of key and value; the first becomes the ordered scores (wide:
                       // [3, ..], blend: [5, ..])
  int64_t padded_lag;  // L padded so that scores can be read 16 bytes at a time
  int64_t rows;        // [L] pointers: where the rows of a partition lie (ragged forms)
  int64_t shared_bytes;
  int64_t scratch_bytes;  // of one block
  bool reference_in_scratch, statistics_in_scratch, rows_in_scratch;
};

/// `ragged`: with room for the pointers to the rows of a partition.
inline Storage plan_storage(RowShape shape, int element_size, int64_t key_dim, int64_t value_dim,
                            int64_t lag_size, bool ragged, const Device& device, bool blend = false) {
  const int64_t real = element_size == 8 ? 8 : 4, per_channel = blend ? 4 : 3;
  const int64_t dim = std::max(key_dim, value_dim);
  const int64_t key_reference = round_up(per_channel * key_dim * real, 16);
  const int64_t references = key_reference + round_up(per_channel * value_dim * real, 16);
  const int64_t partial =
      shape.wide() ? 0 : round_up(kThreads / 32 * dim * std::max<int64_t>(2 * element_size, real), 16);
  const int64_t statistics = (blend ? 5 : shape.wide() ? 3 : 2) * padded_lag(lag_size) * real;
  // Static shared memory (reductions, scans, the histogram of the selection) takes less than 2 KiB.
  const int64_t room = device.shared_per_block - 2048;
  Storage plan{};
  plan.padded_lag = padded_lag(lag_size);
  plan.reference_in_scratch = shape.wide() && references > room / 2;
  plan.statistics_in_scratch = statistics + partial + (plan.reference_in_scratch ? 0 : references) > room;
  int64_t& first = plan.reference_in_scratch ? plan.scratch_bytes : plan.shared_bytes;
  plan.key_reference = first;
  plan.value_reference = first + key_reference;
  first += references;
  plan.partial = plan.shared_bytes;
  plan.shared_bytes += partial;
  int64_t& second = plan.statistics_in_scratch ? plan.scratch_bytes : plan.shared_bytes;
  plan.statistics = second;
  second += statistics;
  if (ragged) {
    const int64_t pointers = round_up(lag_size * 8, 16);
    plan.rows_in_scratch = plan.shared_bytes + pointers > room;
    int64_t& third = plan.rows_in_scratch ? plan.scratch_bytes : plan.shared_bytes;
    third = round_up(third, 16);
    plan.rows = third;
    third += pointers;
  }
  plan.shared_bytes =
      std::max<int64_t>(plan.shared_bytes, 16);  // the kernels name it even where all is in scratch
  return plan;
}

/// Scoring blocks that one multiprocessor holds at a time: what registers and shared memory allow.
inline int planned_blocks(RowShape shape, int element_size, int64_t shared_bytes, bool ragged,
                          const Device& device, bool blend = false) {
  constexpr int64_t kStatic = 3072;  // static shared memory and the driver's 1 KiB
  const int64_t fit = std::max<int64_t>(1, device.shared_per_multiprocessor / (shared_bytes + kStatic));
  const int blocks = blocks_per_multiprocessor(shape, element_size, ragged);
  return static_cast<int>(std::min<int64_t>(fit, blend ? blend_blocks(blocks) : blocks));
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
