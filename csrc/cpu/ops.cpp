// The CPU's launchers for operators.h, and the registration of the operators on CPU tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "blocks.h"
#include "driver.h"
#include "isa.h"
#include "operators.h"
#include "stages.h"
#include "values.h"

namespace lagkv::cpu {
namespace {

class Backend {
 public:
  using Half = cpu::Half;
  using BFloat16 = cpu::BFloat16;
  template <class T>
  using RealOf = cpu::RealOf<T>;

  explicit Backend(const Tensor&) : kernels_(*instruction_set().kernels) {}

  template <class T>
  void compress(const CompressParams<T>& p) const {
    Driver<T>(dense_batch(p), kernels_.of<T>()).copy();
  }

  template <class T>
  void compress_(const CompressParams<T>& p) const {
    Driver<T>(dense_batch(p), kernels_.of<T>()).in_place();
  }

  template <class T>
  void partition_bounds(const BoundsParams<T, RealOf<T>>& p) const {
    run_partition_bounds(p, kernels_.of<T>());
  }

  template <class T>
  void lag_score(const ScoreParams<T, RealOf<T>>& p) const {
    run_lag_score(p, kernels_.of<T>());
  }

  template <class T>
  void topk_index(const TopkParams<T>& p) const {
    run_topk_index(p, kernels_.of<T>());
  }

  template <class T>
  void compact(const CompactParams<T>& p) const {
    check_index_values(p);
    run_compact(p, kernels_.of<T>());
  }

  template <class T>
  void compress_ragged_(const RaggedParams<T>& p) const {
    check_slot_values(p.start, p.length, p.batch, p.capacity);
    in_place(p);
  }

  template <class T>
  void compress_varlen(const RaggedParams<T>& p) const {
    check_packed_values(p.key.offsets, p.start, p.batch, p.capacity);
    p.new_offsets[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const RaggedSequence sequence = p.sequence(b);
      p.new_start[b] = static_cast<int32_t>(sequence.new_start);
      p.new_offsets[b + 1] = p.new_offsets[b] + static_cast<int32_t>(sequence.new_length);
    }
    if (p.batch == 0) std::fill_n(p.index, p.heads * p.capacity, -1);  // rows of no sequence
    Driver<T>(ragged_batch(p), kernels_.of<T>()).copy();
  }

  template <class T>
  void compress_paged_(const RaggedParams<T>& p) const {
    const int64_t block_size = p.key.block_size, max_blocks = block_size > 0 ? p.capacity / block_size : 0;
    check_page_values({p.key.block_table, p.key.table_stride, max_blocks, p.start, p.length, p.batch,
                       p.blocks, block_size, p.lag_size, p.keep, p.carried.exists, p.carried.sink});
    in_place(p);
  }

  template <class T>
  void compress_blocks(const BlocksParams<T>& p) const {
    check_blocks_values({p.key.block_table, p.key_out.block_table, p.key.table_stride, p.key_out.table_stride,
                         p.m_before, p.m_after, p.batch, p.tokens, p.capacity, p.blocks, p.key.block_size,
                         p.sink, p.lag_size, p.keep});
    Driver<T>(blocks_batch(p), kernels_.of<T>()).copy();
  }

 private:
  /// Rows first, then the numbers: the driver reads the old ones.
  template <class T>
  void in_place(const RaggedParams<T>& p) const {
    Driver<T>(ragged_batch(p), kernels_.of<T>()).in_place();
    for (int64_t b = 0; b < p.batch; ++b) {
      const RaggedSequence sequence = p.sequence(b);
      p.new_start[b] = static_cast<int32_t>(sequence.new_start);
      p.new_length[b] = static_cast<int32_t>(sequence.new_length);
    }
  }

  const KernelSet& kernels_;
};

std::string cpu_isa() { return instruction_set().name; }

// Checks of validate=True on the numbers of another device, copied to this one.

void check_slot_numbers(const Tensor& start, const Tensor& length, int64_t capacity) {
  check_start_and_length("compress_ragged_", start, length, start.numel());
  check_slot_values(numbers(start), numbers(length), start.size(0), capacity);
}

void check_packed_numbers(const Tensor& cu_seqlens, const Tensor& start, int64_t rows) {
  check_cu_seqlens_and_start("compress_varlen", cu_seqlens, start);
  check_packed_values(numbers(cu_seqlens), numbers(start), start.size(0), rows);
}

void check_page_numbers(const Tensor& block_table, const Tensor& start, const Tensor& length,
                        int64_t lag_size, int64_t keep, int64_t blocks, int64_t block_size, bool scored,
                        int64_t sink_size) {
  const char* op = "compress_paged_";
  check_block_table(op, block_table);
  check_start_and_length(op, start, length, block_table.size(0));
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size, scored ? 0 : 1);
  check_page_values({numbers(block_table), block_table.stride(0), block_table.size(1), numbers(start),
                     numbers(length), start.size(0), blocks, block_size, lag_size, keep, scored, sink_size});
}

void check_block_numbers(const Tensor& source_table, const Tensor& target_table, const Tensor& m_before,
                         const Tensor& m_after, int64_t sink_size, int64_t lag_size, int64_t keep,
                         int64_t blocks, int64_t block_size) {
  check_block_sizes("key_cache", block_size, sink_size, lag_size, keep);
  check_block_tables(source_table, target_table, m_before, m_after, block_size);
  check_blocks_values({numbers(source_table), numbers(target_table), source_table.stride(0),
                       target_table.stride(0), numbers(m_before), numbers(m_after), source_table.size(0),
                       source_table.size(1) * block_size, target_table.size(1) * block_size, blocks,
                       block_size, sink_size, lag_size, keep});
}

}  // namespace
}  // namespace lagkv::cpu

STABLE_TORCH_LIBRARY_IMPL(lagkv, CPU, m) {
  lagkv::Operators<lagkv::cpu::Backend>::register_with(m);
  m.impl("_check_slots", TORCH_BOX(&lagkv::cpu::check_slot_numbers));
  m.impl("_check_packed", TORCH_BOX(&lagkv::cpu::check_packed_numbers));
  m.impl("_check_pages", TORCH_BOX(&lagkv::cpu::check_page_numbers));
  m.impl("_check_blocks", TORCH_BOX(&lagkv::cpu::check_block_numbers));
}

// No tensor tells the dispatcher where to go.
STABLE_TORCH_LIBRARY_IMPL(lagkv, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&lagkv::cpu::cpu_isa));
}
