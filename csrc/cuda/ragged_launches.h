// From RaggedParams to kernel launches, as launches.h for the dense operators: what the launchers (.cu) and
// the executor's bindings share.
#pragma once

#include "launches.h"
#include "ragged_compress.cuh"
#include "ragged_move.cuh"

namespace lagkv::cuda {

/// Scratch for the table of the sequences, which all kernels of a call share.
template <class Scratch>
SequenceTable make_table(int64_t batch, const Scratch& scratch) {
  return {static_cast<int32_t*>(scratch(SequenceTable::size(batch) * static_cast<int64_t>(sizeof(int32_t)))),
          batch};
}

/// Everything of compress_varlen; of the others all but the move of the rows: new starts and lengths, index.
template <class T, class Scratch, class Run>
void launch_ragged(const RaggedParams<T>& args, const SequenceTable& table, const Device& device,
                   const Scratch& scratch, const Run& run) {
  const bool packed = args.is_packed();
  if (args.batch == 0 && !packed) return;
  RaggedLaunch<T> launch{args, table, nullptr, {}, packed};
  launch.plan = plan_ragged(shape_of(args.key, args.value), sizeof(T), args.key.dim, args.value.dim,
                            args.batch, args.heads, packed ? args.capacity : args.batch * args.capacity,
                            args.lag_size, args.keep, packed, device);
  if (args.key.is_paged()) {
    run_blocks(run, pages_kernel<T>, args.batch, kThreads, 0, PagesLaunch<T>{args, table, 0}, device);
  }
  run(schedule_kernel<T>, 1, kThreads, 0, ScheduleLaunch<T>{args, table, launch.plan});
  if (args.heads * args.capacity == 0) return;
  if (launch.plan.scratch_bytes > 0) {
    launch.scratch = static_cast<unsigned char*>(scratch(launch.plan.scratch_bytes));
  }
  with_layout<T>(launch.plan.shape, [&](auto tag) {
    using Layout = typename decltype(tag)::Type;
    const auto kernel = args.score == Score::kStd ? ragged_kernel<Layout, Score::kStd>
                                                  : ragged_kernel<Layout, Score::kCosine>;
    run(kernel, launch.plan.blocks, kThreads, launch.plan.storage.shared_bytes, launch);
  });
}

/// In place, after launch_ragged: the rows move.
template <class T, class Run>
void launch_ragged_move(const RaggedParams<T>& args, const SequenceTable& table, const Device& device,
                        const Run& run) {
  if (args.keep == args.lag_size || args.capacity < 2 * args.lag_size) return;  // every row stays
  const Rows<T>&key = args.key_out, &value = args.value_out;
  const int64_t bytes = (key.dim | value.dim) * static_cast<int64_t>(sizeof(T));
  with_word(bytes, std::min(alignment_of(key), alignment_of(value)), [&](auto word) {
    using W = decltype(word);
    const RaggedMoveLaunch<W> launch{in_words<W>(key), in_words<W>(value), table,
                                     args.index,       args.heads,         args.capacity,
                                     args.lag_size,    args.keep,          move_blocks(device)};
    // As many jobs as there can be, where they are few.
    const int64_t jobs = args.batch * args.heads * (launch.key.dim + launch.value.dim);
    const int64_t blocks = std::min({launch.blocks, jobs, device.max_grid});
    if (blocks > 0) run(ragged_move_kernel<W>, blocks, kMoveThreads, 0, launch);
  });
}

}  // namespace lagkv::cuda
