// Validates each sequence on the device and assigns runs, tiles and moves to blocks. The host knows
// capacities alone. pages_kernel, a block a sequence, finds out whether all blocks that hold its tokens are
// in the pool. schedule_kernel, one block, reads and judges the sequences, chooses the length of runs, and
// says where each sequence's runs, tiles and moves begin among all of them; it also writes the new starts and
// lengths.
//
// A sequence whose numbers cannot be (docs/operators.md: a negative start or length, a length beyond the
// capacity, a block outside the pool) keeps its rows, its start and its length, and its index is -1. Packed
// rows: a negative start leaves a sequence as it is, and cu_seqlens that do not begin with 0, decrease or
// leave the rows leave no sequence at all: the new cu_seqlens are 0.
#pragma once

#include "../ragged.h"
#include "layout.cuh"

namespace lagkv::cuda {

/// A number that this kernel may write: start and length become the new ones in place.
struct LoadCoherent {
  __device__ __forceinline__ int32_t operator()(const int32_t* number) const { return ld_global(number); }
};

/// Sequence numbers that the kernels of one call share, in scratch: columns of [B + 2] numbers. Entry B: the
/// packed rows behind all sequences.
struct SequenceTable {
  int32_t* numbers;
  int64_t batch;

  static int64_t size(int64_t batch) { return 7 * (batch + 2) + 1; }

  __device__ __forceinline__ int32_t* usable(int64_t b) const { return column(0) + b; }
  __device__ __forceinline__ int32_t* start(int64_t b) const { return column(1) + b; }
  __device__ __forceinline__ int32_t* length(int64_t b) const { return column(2) + b; }
  __device__ __forceinline__ int32_t* compressed(int64_t b) const { return column(3) + b; }
  /// Runs, tiles and moves of all sequences are numbered one after the other: the first of sequence b.
  __device__ __forceinline__ int32_t* first_run(int64_t b) const { return column(4) + b; }
  __device__ __forceinline__ int32_t* first_tile(int64_t b) const { return column(5) + b; }
  __device__ __forceinline__ int32_t* first_move(int64_t b) const { return column(6) + b; }
  /// Partitions per run.
  __device__ __forceinline__ int32_t* run() const { return column(7); }

 private:
  __device__ __forceinline__ int32_t* column(int64_t number) const { return numbers + number * (batch + 2); }
};

template <class T>
struct PagesLaunch {
  RaggedParams<T> args;
  SequenceTable table;
};

/// usable[b] = all blocks of the first length[b] tokens are in the pool. Traffic: 4 bytes a block in use.
template <class T>
__global__ void __launch_bounds__(kThreads) pages_kernel(const PagesLaunch<T> launch) {
  const RaggedParams<T>& args = launch.args;
  const int64_t b = blockIdx.x;
  const RaggedSequence sequence = args.sequence(b, LoadNc{});
  const int64_t pages = sequence.length > 0 ? ceil_div(sequence.length, args.key.block_size) : 0;
  const int32_t* blocks = args.key.block_table + b * args.key.table_stride;
  bool outside = false;
  for (int64_t page = thread_of_block(); page < pages; page += kThreads) {
    const int32_t block = ld_global_nc(blocks + page);
    outside |= block < 0 || block >= args.blocks;
  }
  outside = __syncthreads_or(outside);
  if (thread_of_block() == 0) st_global(launch.table.usable(b), outside ? 0 : 1);
}

template <class T>
struct ScheduleLaunch {
  RaggedParams<T> args;
  SequenceTable table;
  RaggedPlan plan;
};

/// Runs as long as the machine is still filled, as run_length (plan.h) says for sequences of one length: warp
/// w tries w + 1 rounds of blocks. Cost = rounds x rows that a job moves on average, or the longest job.
/// `costs` [2 * kWarps] shared. No result of an operator changes with it.
template <class T>
__device__ __forceinline__ int64_t choose_run(const ScheduleLaunch<T>& launch, int64_t partitions,
                                              int64_t* costs) {
  const RaggedParams<T>& args = launch.args;
  const Place place;
  const int64_t concurrent = launch.plan.concurrent;
  const int64_t wanted = ceil_div(partitions * args.heads, (place.warp + 1) * concurrent);
  const int64_t run = wanted > 0 ? wanted : 1;
  int64_t runs = 0, longest = 0;
  for (int64_t b = place.lane; b < args.batch; b += 32) {
    const int64_t compressed = ld_global(launch.table.compressed(b));
    const int64_t first = compressed < run ? compressed : run;
    longest = longest < first ? first : longest;
    runs += ceil_div(compressed, run);
  }
  runs = lanes_sum<32>(runs);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(kFullWarp, longest, offset);
    longest = longest < other ? other : longest;
  }
  if (place.lane == 0) {
    const int64_t jobs = runs * args.heads > 0 ? runs * args.heads : 1;
    const int64_t rows = partitions * args.heads * (args.lag_size + args.keep) + jobs * args.lag_size;
    const int64_t all = ceil_div(jobs, concurrent) * ceil_div(rows, jobs);
    const int64_t one = longest * (args.lag_size + args.keep) + args.lag_size;
    st_shared(costs + kWarps + place.warp, run);
    st_shared(costs + place.warp, all > one ? all : one);
  }
  __syncthreads();
  int best = 0;
  for (int other = 1; other < kWarps; ++other) {
    if (ld_shared(costs + other) < ld_shared(costs + best)) best = other;
  }
  return ld_shared(costs + kWarps + best);
}

/// By the thread that has sequence b: its entries of the table and its new numbers. Returns how many of its
/// partitions lose tokens.
template <class T>
__device__ __forceinline__ int64_t enter_sequence(const ScheduleLaunch<T>& launch, int64_t b,
                                                  bool rows_broken) {
  const RaggedParams<T>& args = launch.args;
  const SequenceTable& table = launch.table;
  RaggedSequence sequence = args.sequence(b, LoadCoherent{});
  if (args.key.is_paged() && ld_global_nc(table.usable(b)) == 0) {
    sequence = {};
  }
  const int32_t start = ld_global(args.start + b);
  if (args.is_packed()) {
    if (!sequence.valid || rows_broken) {
      const int64_t tokens = static_cast<int64_t>(ld_global(args.key.offsets + b + 1)) -
                             static_cast<int64_t>(ld_global(args.key.offsets + b));
      sequence = {true, 0, rows_broken ? 0 : tokens, 0, start, 0};
    }
    st_global(args.new_start + b, static_cast<int32_t>(sequence.new_start));
  } else if (sequence.compressed > 0) {
    st_global(args.new_start + b, static_cast<int32_t>(sequence.new_start));
    st_global(args.new_length + b, static_cast<int32_t>(sequence.new_length));
  }
  // keep = lag_size loses nothing: then nothing is scored, unless the scores go with the rows.
  const int64_t compressed = args.keep < args.lag_size || args.carried.exists ? sequence.compressed : 0;
  st_global(table.start(b), static_cast<int32_t>(sequence.start));
  st_global(table.length(b), static_cast<int32_t>(sequence.length));
  st_global(table.compressed(b), static_cast<int32_t>(compressed));
  return compressed;
}

/// Traffic: a few numbers per sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) schedule_kernel(const ScheduleLaunch<T> launch) {
  LAGKV_SHARED(int64_t, memory, 2 * kWarps);
  const RaggedParams<T>& args = launch.args;
  const SequenceTable& table = launch.table;
  const bool packed = args.is_packed();
  const int thread = thread_of_block();

  bool broken = packed && ld_global(args.key.offsets) != 0;
  for (int64_t b = thread; packed && b < args.batch; b += kThreads) {
    const int32_t first = ld_global(args.key.offsets + b), last = ld_global(args.key.offsets + b + 1);
    broken |= last < first || last > args.capacity;
  }
  broken = __syncthreads_or(broken);
  int64_t partitions = 0;
  for (int64_t b = thread; b < args.batch; b += kThreads) partitions += enter_sequence(launch, b, broken);
  partitions = block_scan(partitions, memory).total;
  const int64_t run = choose_run(launch, partitions, memory);
  if (thread == 0) st_global(table.run(), static_cast<int32_t>(run));
  __syncthreads();

  int64_t runs_before = 0, tiles_before = 0, moves_before = 0, rows_before = 0;
  for (int64_t base = 0; base < args.batch + 2; base += kThreads) {
    const int64_t b = base + thread;
    const bool exists = b < args.batch;
    const int64_t length = exists ? ld_global(table.length(b)) : 0;
    const int64_t compressed = exists ? ld_global(table.compressed(b)) : 0;
    const int64_t rows = packed ? length - compressed * (args.lag_size - args.keep) : 0;
    const Scan all_rows = block_scan(rows, memory);
    // Entries of the index that are not those of kept tokens.
    int64_t entries = 0;
    if (packed) {
      entries = exists ? length - compressed * args.lag_size
                       : (b == args.batch ? args.capacity - (rows_before + all_rows.before) : 0);
    } else if (exists) {
      entries = args.capacity - compressed * args.keep;
    }
    const Scan all_runs = block_scan(ceil_div(compressed, run), memory);
    const Scan all_moves = block_scan(compressed > 0 ? 1 : 0, memory);
    const Scan all_tiles = block_scan(ceil_div(entries, launch.plan.tile), memory);
    if (b < args.batch + 2) {
      st_global(table.first_run(b), static_cast<int32_t>(runs_before + all_runs.before));
      st_global(table.first_tile(b), static_cast<int32_t>(tiles_before + all_tiles.before));
      st_global(table.first_move(b), static_cast<int32_t>(moves_before + all_moves.before));
    }
    if (packed && b <= args.batch) {
      st_global(args.new_offsets + b, static_cast<int32_t>(rows_before + all_rows.before));
    }
    if (b == args.batch) {
      st_global(table.start(b), 0);
      st_global(table.length(b), 0);
      st_global(table.compressed(b), 0);
    }
    runs_before += all_runs.total;
    tiles_before += all_tiles.total;
    moves_before += all_moves.total;
    rows_before += all_rows.total;
  }
}

/// The sequence to which item `item` belongs: the last one whose first (a column of the table) is at or
/// before it. Every one of the block's `threads` threads gets it, after a barrier.
template <int threads>
__device__ __forceinline__ int find_sequence(const int32_t* firsts, int64_t entries, int64_t item) {
  int found = 0;
  for (int64_t base = 1; base <= entries; base += threads) {
    const int64_t b = base + thread_of_block();
    const int before = __syncthreads_count(b < entries && ld_global_nc(firsts + b) <= item);
    found += before;
    if (before < threads) break;
  }
  return found;
}

}  // namespace lagkv::cuda
