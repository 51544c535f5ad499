// From scores to the index where all rows of a head compete: more than a block that scores has at hand, and
// so a kernel of its own. It knows the type of scores alone. The scores of a head lie one after the other, in
// the order of its rows.
//
// Traffic: reads every score that competes once per 8 bits of its type and once more, from L2, and writes
// the index of the kept rows. Limits: none but memory.
#pragma once

#include "ragged.cuh"

namespace lagkv::cuda {

/// The scores of a call: every head's, and how many of them are new.
template <class Real>
struct HeadScores {
  ScoreTarget<Real> rows;  // at row 0 of the first head; packed rows: at row 0 of the tensor
  const int32_t* offsets;  // packed rows: cu_seqlens; else null
  SequenceTable table;     // numbers null: start and compressed hold for every sequence
  int64_t start, compressed;
  int64_t batch, heads, lag_size;

  /// The score of row 0 of a head of all.
  __device__ __forceinline__ Real* of_head(int64_t head) const {
    return score_row(rows, offsets, heads, head / heads, head % heads);
  }
  __device__ __forceinline__ int64_t start_of(int64_t sequence) const {
    return table.numbers == nullptr ? start : ld_global_nc(table.start(sequence));
  }
  __device__ __forceinline__ int64_t compressed_of(int64_t sequence) const {
    return table.numbers == nullptr ? compressed : ld_global_nc(table.compressed(sequence));
  }
};

/// Ordered scores that this block may have written; zeros behind the last one.
template <class Real>
struct WrittenKeys {
  const Real* score;
  int count;

  __device__ __forceinline__ typename Order<Real>::Bits get(int i) const {
    return i < count ? ordered(ld_global(score + i)) : 0;
  }
};

/// The index that a choice fills.
struct ChosenIndex {
  int32_t* index;          // row 0 of the first head; packed rows: [H, T]
  int64_t stride;          // from head to head
  const int32_t* offsets;  // packed rows: the new cu_seqlens; else null

  __device__ __forceinline__ int32_t* of_head(int64_t heads, int64_t head) const {
    return offsets == nullptr ? index + head * stride
                              : index + head % heads * stride + ld_global_nc(offsets + head / heads);
  }
};

template <class Real>
struct HeadChoiceLaunch {
  HeadScores<Real> scores;
  ChosenIndex index;
  Carried<Real> carried;
  int64_t keep;
};

/// The kept rows of a head: their positions and, where scores go with the rows, their scores.
template <class Real>
struct KeptRivals {
  KeptIndex positions;
  const Real* score;  // the first row that competes
  Rows<Real> carried;
  int64_t first;  // number of its score among the carried ones
  bool carries;

  __device__ __forceinline__ void put(int n, int i) const {
    positions.put(n, i);
    if (carries) st_global(carried.row(first + n, LoadNc{}), ld_global(score + i));
  }
};

/// All rows of a head that have a score compete: those that earlier calls kept, then the new ones. A block
/// takes a head. Carried scores go before the new ones first: where they lie is then free to be written.
template <class Real>
__global__ void __launch_bounds__(kThreads) choose_in_head_kernel(const HeadChoiceLaunch<Real> launch) {
  using Bits = typename Order<Real>::Bits;
  LAGKV_SHARED(int, counts, 4 * kWarps);
  LAGKV_SHARED(unsigned, histogram, kBins + 2);
  const HeadScores<Real>& scores = launch.scores;
  const Carried<Real>& carried = launch.carried;
  const int64_t head = block_of_grid(), sequence = head / scores.heads, h = head % scores.heads;
  const int64_t start = scores.start_of(sequence), compressed = scores.compressed_of(sequence);
  const int64_t sink = carried.exists && carried.sink < start ? carried.sink : start;
  const int64_t earlier = start - sink, first = sink - carried.first;
  if (compressed == 0) {  // no row is dropped
    if (carried.in.data == carried.out.data) return;
    for (int64_t i = thread_of_block(); i < earlier; i += kThreads) {
      st_global(carried.out.row(sequence, h, first + i, LoadNc{}),
                ld_global(carried.in.row(sequence, h, first + i, LoadNc{})));
    }
    return;
  }
  Real* const own = scores.of_head(head) + sink;
  for (int64_t i = thread_of_block(); i < earlier; i += kThreads) {
    st_global(own + i, ld_global(carried.in.row(sequence, h, first + i, LoadNc{})));
  }
  __syncthreads();
  const int count = static_cast<int>(earlier + compressed * scores.lag_size);
  const int keep = static_cast<int>(earlier + compressed * launch.keep);
  if (keep == 0) return;
  const KeptRivals<Real> kept{{launch.index.of_head(scores.heads, head) + sink, sink},
                              own,
                              carried.out.head(sequence, h, LoadNc{}),
                              first,
                              carried.exists};
  select_by_radix<Bits>(WrittenKeys<Real>{own, count}, count, keep, {counts, histogram}, kept);
}

}  // namespace lagkv::cuda
