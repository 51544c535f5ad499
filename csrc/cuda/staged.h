// Launches where all rows of a head compete (Budget::kHead), so that none is selected as it is scored: scores
// go to global memory, rows are chosen from there (rivals.cuh) and follow. score(args, target) launches the
// scoring kernels, whose instances take long to compile; the rest as launch.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "gather.cuh"
#include "launch.h"
#include "rivals.cuh"

namespace lagkv::cuda {

/// True where rows compete beyond their partition.
template <class Params>
bool is_staged(const Params& args) {
  return args.carried.exists || (args.keep < args.lag_size && args.method.budget == Budget::kHead);
}

/// Fills the index of the rows that compete, and the scores that go with those kept.
template <class T, class Run>
void launch_choice(const HeadScores<RealOf<T>>& scores, const ChosenIndex& index, const Carried<T>& carried,
                   int64_t keep, const Run& run) {
  static_assert(std::is_same_v<RealOf<T>, ScoreOf<T>>, "scores are carried as they are computed");
  run(choose_in_head_kernel<RealOf<T>>, grid_of(scores.batch * scores.heads), kThreads, 0,
      HeadChoiceLaunch<RealOf<T>>{
          scores, index, {carried.exists, carried.sink, carried.first, carried.in, carried.out}, keep});
}

/// compress, compress_carried and, where the outputs are the inputs, compress_.
template <class T, class Scratch, class Run, class ScoreRows>
void launch_staged(const CompressParams<T>& args, bool in_place, const Device& device, const Scratch& scratch,
                   const Run& run, const ScoreRows& score) {
  using Real = RealOf<T>;
  const int64_t partitions = compressed_count(args.length, args.start, args.lag_size);
  const int64_t heads = args.batch * args.heads;
  const int64_t rows = output_length(args.length, args.start, args.lag_size, args.keep);
  if (heads == 0) return;
  CompressParams<T> index_only = args;
  index_only.key_out = index_only.value_out = {};
  HeadScores<Real> scores{{nullptr, args.length}, nullptr, {}, args.start, partitions, args.batch, args.heads,
                          args.lag_size};
  if (partitions > 0) {
    scores.rows.data = static_cast<Real*>(scratch(heads * args.length * static_cast<int64_t>(sizeof(Real))));
    score(index_only, ScoreTarget<Real>{scores.rows.data + args.start, args.length});
  } else if (rows > 0) {
    score(in_place ? index_only : args, ScoreTarget<Real>{});  // every row is kept
  }
  if (partitions > 0 || (args.carried.exists && !in_place)) {
    launch_choice<T>(scores, {args.index, rows, nullptr}, args.carried, args.keep, run);
  }
  if (partitions == 0) return;
  if (in_place) {
    if (rows == args.length) return;  // every row is kept
    const int64_t first = args.carried.exists ? std::min(args.carried.sink, args.start) : args.start;
    launch_move(args.key_out, args.value_out, args.index, args.batch, args.heads, first, rows, device, run);
    return;
  }
  const Rows<const int32_t> index{args.index, args.heads * rows, rows, 1, 1, nullptr, nullptr, 0, 0};
  launch_compact(CompactParams<T>{args.key, args.key_out, index, args.batch, args.heads, args.length, rows},
                 run);
  launch_compact(
      CompactParams<T>{args.value, args.value_out, index, args.batch, args.heads, args.length, rows}, run);
}

template <class T, class Run>
void launch_gather(const Rows<const T>& x, const Rows<T>& out, const RaggedParams<T>& args, const Run& run) {
  with_word(x.dim * static_cast<int64_t>(sizeof(T)), std::min(alignment_of(x), alignment_of(out)),
            [&](auto word) {
              using W = decltype(word);
              const GatherLaunch<W> launch{in_words<W>(x),
                                           in_words<W>(out),
                                           args.index,
                                           args.batch,
                                           args.heads,
                                           args.capacity,
                                           plan_compact(args.heads, args.capacity, in_words<W>(x).dim)};
              if (launch.plan.blocks > 0)
                run(gather_kernel<W>, grid_of(launch.plan.blocks), kThreads, 0, launch);
            });
}

/// As launch_ragged: everything of compress_varlen; of the others all but the move of the rows.
template <class T, class Scratch, class Run, class ScoreRows>
void launch_staged(const RaggedParams<T>& args, const SequenceTable& table, const Device& device,
                   const Scratch& scratch, const Run& run, const ScoreRows& score) {
  using Real = RealOf<T>;
  const bool packed = args.is_packed();
  const int64_t elements = (packed ? 1 : args.batch) * args.heads * args.capacity;
  if (args.batch == 0 || elements == 0 || args.capacity < 2 * args.lag_size) {
    return score(args, table, ScoreTarget<Real>{});  // no sequence loses rows
  }
  auto* const memory = static_cast<Real*>(scratch(elements * static_cast<int64_t>(sizeof(Real))));
  HeadScores<Real> scores{{memory, args.capacity},
                          packed ? args.key.offsets : nullptr,
                          table,
                          0,
                          0,
                          args.batch,
                          args.heads,
                          args.lag_size};
  score(args, table, scores.rows);
  launch_choice<T>(scores, {args.index, args.capacity, packed ? args.new_offsets : nullptr}, args.carried,
                   args.keep, run);
  if (!packed) return;
  launch_gather(args.key, args.key_out, args, run);
  launch_gather(args.value, args.value_out, args, run);
}

}  // namespace lagkv::cuda
