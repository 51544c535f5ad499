// Runs of sequences whose rows lie anywhere: where the rows of a partition lie is looked up once per row,
// before they stream. Slots, packed rows and pages then look the same, and the block table costs the
// streaming loop nothing.
#pragma once

#include "score_run.cuh"

namespace lagkv::cuda {

/// A run, and the head that it is of.
template <class T>
struct ScatteredState : RunState<T> {
  int64_t head;
  int32_t sequence;
};

template <class Layout, class Launch, class State>
struct ScatteredRun : RunBlock<Layout, Launch, State> {
  using T = typename Layout::T;
  using Tile = ScatteredTile<T>;

  /// Looks up where the rows of a partition lie. All threads have passed a barrier since the last tile was
  /// read; ends with one.
  __device__ __forceinline__ void stage(int side, int partition) const {
    const auto& args = this->launch.args;
    const Rows<const T> x = side_of(side, args.key, args.value);
    const auto rows = staged_rows();
    const int64_t first = ld_shared(&this->state->start) + partition * args.lag_size;
#pragma unroll 1
    for (int64_t t = thread_of_block(); t < args.lag_size; t += kThreads) {
      rows.set(t,
               x.row(ld_shared(&this->state->sequence), ld_shared(&this->state->head), first + t, LoadNc{}));
    }
    __syncthreads();
  }

  __device__ __forceinline__ Tile tile(int side, int /*partition*/) const {
    return {staged_rows(), this->dim(side), this->inverse_dim(side), this->count()};
  }

 private:
  __device__ __forceinline__ Store<const T*> staged_rows() const {
    const Storage& storage = this->launch.plan.storage;
    return this->template store<const T*>(storage.rows, storage.rows_in_scratch);
  }
};

}  // namespace lagkv::cuda
