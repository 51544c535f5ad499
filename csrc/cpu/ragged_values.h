// Checks of the values that say where sequences lie: on the CPU before anything is written.
// lagkv_ext/checks_ragged.py has the same for other devices, on request.
#pragma once

#include <vector>

#include "checks_ragged.h"

namespace lagkv::cpu {

template <class T>
void check_starts(const char* op, const RaggedParams<T>& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    check(p.start[b] >= 0, op, "start must be at least 0, got ", p.start[b], " for sequence ", b);
  }
}

template <class T>
void check_lengths(const char* op, const RaggedParams<T>& p, const char* bound_name) {
  for (int64_t b = 0; b < p.batch; ++b) {
    check(p.length[b] >= 0 && p.length[b] <= p.capacity, op, "length must be between 0 and ", bound_name,
          " (", p.capacity, "), got ", p.length[b], " for sequence ", b);
  }
}

template <class T>
void check_slot_values(const RaggedParams<T>& p) {
  check_starts("compress_ragged_", p);
  check_lengths("compress_ragged_", p, "the capacity");
}

template <class T>
void check_packed_values(const RaggedParams<T>& p) {
  const char* op = "compress_varlen";
  const int32_t* offsets = p.key.offsets;
  check(offsets[0] == 0, op, "cu_seqlens must begin with 0, got ", offsets[0]);
  for (int64_t i = 1; i <= p.batch; ++i) {
    check(offsets[i] >= offsets[i - 1], op, "cu_seqlens must not decrease, got ", offsets[i], " after ",
          offsets[i - 1], " at ", i);
    check(offsets[i] <= p.capacity, op, "cu_seqlens must be at most the rows of key (", p.capacity, "), got ",
          offsets[i], " at ", i);
  }
  check_starts(op, p);
}

/// Calls visit(b, j, block, written) for every block in use, in the order of the table. Written are those
/// from the start to the new length of a sequence whose rows move.
template <class T, class Visit>
void visit_blocks(const RaggedParams<T>& p, const Visit& visit) {
  const int64_t size = p.key.block_size;
  for (int64_t b = 0; b < p.batch; ++b) {
    const RaggedSequence s = p.sequence(b);
    for (int64_t j = 0; j * size < s.length; ++j) {
      const bool written = s.new_length < s.length && s.start < (j + 1) * size && j * size < s.new_length;
      visit(b, j, p.key.block_table[b * p.key.table_stride + j], written);
    }
  }
}

template <class T>
void check_page_values(const RaggedParams<T>& p) {
  const char* op = "compress_paged_";
  check_starts(op, p);
  check_lengths(op, p, "the rows of its blocks");
  struct Use {
    int32_t count = 0;
    bool written = false;
  };
  std::vector<Use> uses(static_cast<size_t>(p.blocks));
  bool twice = false;
  visit_blocks(p, [&](int64_t b, int64_t j, int32_t block, bool written) {
    check(block >= 0 && block < p.blocks, op, "block_table must hold blocks between 0 and ", p.blocks - 1,
          ", got ", block, " at [", b, ", ", j, "]");
    Use& use = uses[static_cast<size_t>(block)];
    use.written |= written;
    twice |= ++use.count > 1;
  });
  if (!twice) return;
  int64_t found = -1, first[2] = {0, 0};
  visit_blocks(p, [&](int64_t b, int64_t j, int32_t block, bool) {
    const Use& use = uses[static_cast<size_t>(block)];
    check(block != found, op, "block_table must not hold a block twice that is written, got block ", block,
          " at [", first[0], ", ", first[1], "] and [", b, ", ", j, "]");
    if (found < 0 && use.count > 1 && use.written) found = block, first[0] = b, first[1] = j;
  });
}

}  // namespace lagkv::cpu
