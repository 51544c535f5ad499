// From rows to kernel launches: what the launchers (.cu) and the executor's bindings share. Each `launch_*`
// makes the plan, chooses the instantiation and calls run(kernel, grid, threads, shared_bytes, params) for
// every kernel, in order. `scratch(bytes)` gives device memory that lives until the kernels have run.
// Includes device code, so it is compiled by nvcc or for the executor.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "blocks.cuh"
#include "bounds.cuh"
#include "compact.cuh"
#include "compress.cuh"
#include "move.cuh"
#include "ragged.cuh"
#include "topk.cuh"

namespace lagkv::cuda {

template <class Layout>
struct LayoutTag {
  using Type = Layout;
};

/// Calls f(LayoutTag<..>) for the layout of a shape that `row_shape` gave for T.
template <class T, class F>
void with_layout(RowShape shape, const F& f) {
  const auto is = [&](int elements, int lanes, int chunks) {
    return shape.elements == elements && shape.lanes == lanes && shape.chunks == chunks;
  };
  if (shape.wide()) return f(LayoutTag<WideRow<T>>{});
  if (shape.elements == 1) return f(LayoutTag<Row<T, 1, 32, 8>>{});
  constexpr int kElements = 16 / sizeof(T);
  if constexpr (sizeof(T) == 2) {
    if (is(kElements, 8, 1)) return f(LayoutTag<Row<T, kElements, 8, 1>>{});
  }
  if constexpr (sizeof(T) <= 4) {
    if (is(kElements, 16, 1)) return f(LayoutTag<Row<T, kElements, 16, 1>>{});
  }
  if (is(kElements, 32, 1)) return f(LayoutTag<Row<T, kElements, 32, 1>>{});
  if (is(kElements, 32, 2)) return f(LayoutTag<Row<T, kElements, 32, 2>>{});
  if constexpr (sizeof(T) == 8) {
    if (is(kElements, 32, 4)) return f(LayoutTag<Row<T, kElements, 32, 4>>{});
  }
  throw std::logic_error("lagkv: the planner chose a row layout that has no kernel");
}

/// The layout of two tensors that share a kernel: both aligned or neither, wide enough for the wider one.
template <class T>
RowShape shape_of(const Rows<const T>& key, const Rows<const T>& value, bool blend) {
  const bool aligned =
      rows_aligned(key) && rows_aligned(value) && std::min(key.dim, value.dim) * sizeof(T) % 16 == 0;
  if (std::min(key.dim, value.dim) < 1) return row_shape(sizeof(T), 0, false);
  return row_shape(sizeof(T), std::max(key.dim, value.dim), aligned, blend);
}

/// compress (key_out, value_out given) and the first step of compress_ (data null). With `score`: the scores
/// alone and, where the index is given, the index of the rows before and after the partitions.
template <class T, class Scratch, class Run>
void launch_compress(const CompressParams<T>& args, const ScoreTarget<RealOf<T>>& score, const Device& device,
                     const Scratch& scratch, const Run& run) {
  // An output of no elements has no memory: rows are copied where either output has some.
  const bool copies = args.key_out.data != nullptr || args.value_out.data != nullptr;
  const bool blend = args.method.score == Score::kBlend;
  CompressLaunch<T> launch{args, score, copies, nullptr, {}};
  launch.plan = plan_compress(shape_of(args.key, args.value, blend), sizeof(T), args.key.dim, args.value.dim,
                              args.batch * args.heads, args.length, args.start, args.lag_size, args.keep,
                              score.data != nullptr, args.index != nullptr, device, blend);
  if (launch.plan.blocks == 0) return;
  const int64_t grid = grid_of(launch.plan.blocks);
  if (launch.plan.scratch_bytes > 0)
    launch.scratch = static_cast<unsigned char*>(scratch(launch.plan.scratch_bytes));
  with_layout<T>(launch.plan.shape, [&](auto tag) {
    using Layout = typename decltype(tag)::Type;
    const auto kernel = args.method.score == Score::kStd      ? compress_kernel<Layout, Score::kStd>
                        : args.method.score == Score::kCosine ? compress_kernel<Layout, Score::kCosine>
                                                              : compress_kernel<Layout, Score::kBlend>;
    run(kernel, grid, kThreads, launch.plan.storage.shared_bytes, launch);
  });
}

template <class T, class Run>
void launch_bounds(const BoundsParams<T, RealOf<T>>& args, const Run& run) {
  const RowShape shape = row_shape(sizeof(T), args.x.dim, rows_aligned(args.x));
  const BoundsLaunch<T> launch{args, plan_bounds(shape, sizeof(T), args.x.dim, args.batch * args.heads,
                                                 args.length, args.start, args.lag_size)};
  if (launch.plan.blocks == 0) return;
  with_layout<T>(shape, [&](auto tag) {
    run(bounds_kernel<typename decltype(tag)::Type>, grid_of(launch.plan.blocks), kThreads,
        launch.plan.shared_bytes, launch);
  });
}

template <class T, class Run>
void launch_topk(const TopkParams<T>& args, const Device& device, const Run& run) {
  const TopkLaunch<T> launch{args, plan_topk(sizeof(BitsOf<T>), args.lag_size, device)};
  run(topk_kernel<T>, grid_of(args.rows), kThreads, launch.plan.shared_bytes, launch);
}

/// Calls f(W()) with the widest machine word that moves rows of `bytes` bytes whose starts are multiples of
/// `alignment`.
template <class F>
void with_word(int64_t bytes, int64_t alignment, const F& f) {
  const auto fits = [&](int64_t size) { return bytes % size == 0 && alignment % size == 0; };
  if (fits(16)) return f(Vec<uint32_t, 4>{});
  if (fits(8)) return f(Vec<uint32_t, 2>{});
  if (fits(4)) return f(uint32_t{});
  return f(uint16_t{});
}

/// The largest power of two up to 16 that divides the address and every stride, in bytes.
template <class T>
int64_t alignment_of(const Rows<T>& rows) {
  const int64_t bits =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) | 16 |
      ((rows.block_stride | rows.head_stride | rows.row_stride) * static_cast<int64_t>(sizeof(T)));
  return bits & -bits;
}

/// with_word for key and value that move alike: both widths are a multiple of the word.
template <class T, class F>
void with_word_of_both(const Rows<T>& key, const Rows<T>& value, const F& f) {
  const int64_t bytes = (key.dim | value.dim) * static_cast<int64_t>(sizeof(T));
  with_word(bytes, std::min(alignment_of(key), alignment_of(value)), f);
}

/// The same rows in units of W.
template <class W, class T>
Rows<std::conditional_t<std::is_const_v<T>, const W, W>> in_words(const Rows<T>& rows) {
  const auto words = [](int64_t elements) {
    return elements * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(W));
  };
  using Word = std::conditional_t<std::is_const_v<T>, const W, W>;
  return {reinterpret_cast<Word*>(rows.data),
          words(rows.block_stride),
          words(rows.head_stride),
          words(rows.row_stride),
          words(rows.dim),
          rows.offsets,
          rows.block_table,
          rows.table_stride,
          rows.block_size};
}

/// compact for any element type of 2 bytes or more: the rows are moved, not understood.
template <class T, class Run>
void launch_compact(const CompactParams<T>& args, const Run& run) {
  const int64_t alignment = std::min(alignment_of(args.x), alignment_of(args.out));
  with_word(args.x.dim * sizeof(T), alignment, [&](auto word) {
    using W = decltype(word);
    const CompactParams<W> words{in_words<W>(args.x), in_words<W>(args.out), args.index, args.batch,
                                 args.heads,          args.length,           args.count};
    const CompactLaunch<W> launch{words, plan_compact(args.batch * args.heads, args.count, words.x.dim)};
    if (launch.plan.blocks > 0) run(compact_kernel<W>, grid_of(launch.plan.blocks), kThreads, 0, launch);
  });
}

/// The second step of compress_: index [B, H, rows] says where the first `rows` rows come from.
template <class T, class Run>
void launch_move(const Rows<T>& key, const Rows<T>& value, const int32_t* index, int64_t batch, int64_t heads,
                 int64_t first, int64_t rows, const Device& device, const Run& run) {
  with_word_of_both(key, value, [&](auto word) {
    using W = decltype(word);
    const MoveLaunch<W> launch{in_words<W>(key), in_words<W>(value), index, heads,
                               plan_move(sizeof(W), in_words<W>(key).dim, in_words<W>(value).dim,
                                         batch * heads, first, rows, device)};
    if (launch.plan.blocks > 0) run(move_kernel<W>, grid_of(launch.plan.blocks), kMoveThreads, 0, launch);
  });
}

/// Scratch for the table of the sequences, which all kernels of a call share.
template <class Scratch>
SequenceTable make_table(int64_t batch, const Scratch& scratch) {
  return {static_cast<int32_t*>(scratch(SequenceTable::size(batch) * static_cast<int64_t>(sizeof(int32_t)))),
          batch};
}

/// Everything of compress_varlen; of the others all but the move of the rows: new starts and lengths, index.
/// With `score`: new starts and lengths, the scores, and the index of the rows before and after the
/// partitions.
template <class T, class Scratch, class Run>
void launch_ragged(const RaggedParams<T>& args, const SequenceTable& table,
                   const ScoreTarget<RealOf<T>>& score, const Device& device, const Scratch& scratch,
                   const Run& run) {
  const bool packed = args.is_packed();
  if (args.batch == 0 && !packed) return;
  const bool blend = args.method.score == Score::kBlend;
  RaggedLaunch<T> launch{args, table, nullptr, {}, packed && score.data == nullptr, score};
  launch.plan = plan_ragged(shape_of(args.key, args.value, blend), sizeof(T), args.key.dim, args.value.dim,
                            args.batch, args.heads, packed ? args.capacity : args.batch * args.capacity,
                            args.lag_size, args.keep, packed, device, score.data != nullptr, blend);
  if (args.key.is_paged()) {
    run(pages_kernel<T>, grid_of(args.batch), kThreads, 0, PagesLaunch<T>{args, table});
  }
  run(schedule_kernel<T>, 1, kThreads, 0, ScheduleLaunch<T>{args, table, launch.plan});
  if (args.heads * args.capacity == 0) return;
  if (launch.plan.scratch_bytes > 0) {
    launch.scratch = static_cast<unsigned char*>(scratch(launch.plan.scratch_bytes));
  }
  with_layout<T>(launch.plan.shape, [&](auto tag) {
    using Layout = typename decltype(tag)::Type;
    const auto kernel = args.method.score == Score::kStd      ? ragged_kernel<Layout, Score::kStd>
                        : args.method.score == Score::kCosine ? ragged_kernel<Layout, Score::kCosine>
                                                              : ragged_kernel<Layout, Score::kBlend>;
    run(kernel, launch.plan.blocks, kThreads, launch.plan.storage.shared_bytes, launch);
  });
}

/// compress_blocks, in one launch.
template <class T, class Scratch, class Run>
void launch_blocks(const BlocksParams<T>& args, const Device& device, const Scratch& scratch,
                   const Run& run) {
  const bool blend = args.method.score == Score::kBlend;
  BlocksLaunch<T> launch{args, nullptr, {}};
  launch.plan = plan_blocks(shape_of(args.key, args.value, blend), sizeof(T), args.key.dim, args.value.dim,
                            args.batch * args.heads, args.capacity, args.lag_size, args.keep, device, blend);
  if (launch.plan.blocks == 0 || args.capacity == 0) return;
  const int64_t grid = grid_of(launch.plan.blocks);
  if (launch.plan.scratch_bytes > 0) {
    launch.scratch = static_cast<unsigned char*>(scratch(launch.plan.scratch_bytes));
  }
  with_layout<T>(launch.plan.shape, [&](auto tag) {
    using Layout = typename decltype(tag)::Type;
    const auto kernel = args.method.score == Score::kStd      ? blocks_kernel<Layout, Score::kStd>
                        : args.method.score == Score::kCosine ? blocks_kernel<Layout, Score::kCosine>
                                                              : blocks_kernel<Layout, Score::kBlend>;
    run(kernel, grid, kThreads, launch.plan.storage.shared_bytes, launch);
  });
}

/// In place, after launch_ragged: the rows move.
template <class T, class Run>
void launch_ragged_move(const RaggedParams<T>& args, const SequenceTable& table, const Device& device,
                        const Run& run) {
  if (args.keep == args.lag_size || args.capacity < 2 * args.lag_size) return;  // every row stays
  const Rows<T>&key = args.key_out, &value = args.value_out;
  with_word_of_both(key, value, [&](auto word) {
    using W = decltype(word);
    const int64_t sink = args.carried.exists ? args.carried.sink : args.capacity;
    const RaggedMoveLaunch<W> launch{
        in_words<W>(key), in_words<W>(value), table,     args.index, args.heads,
        args.capacity,    args.lag_size,      args.keep, sink,       move_blocks(device)};
    // As many jobs as there can be, where they are few.
    const int64_t jobs = args.batch * args.heads * (launch.key.dim + launch.value.dim);
    const int64_t blocks = std::min(launch.blocks, jobs);
    if (blocks > 0) run(ragged_move_kernel<W>, blocks, kMoveThreads, 0, launch);
  });
}

}  // namespace lagkv::cuda
