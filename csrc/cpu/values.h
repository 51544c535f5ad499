// Checks of the numbers that say where sequences lie, before anything is written: on the CPU at every call,
// for other devices on copies of their numbers, on request (lagkv_ext/ragged.py, `validate`).
#pragma once

#include <algorithm>
#include <vector>

#include "messages.h"
#include "ragged.h"

namespace lagkv::cpu {

inline void check_starts(const char* op, const int32_t* start, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    check(start[b] >= 0, op, "start must be at least 0, got ", start[b], " for sequence ", b);
  }
}

inline void check_lengths(const char* op, const int32_t* length, int64_t batch, const char* bound_name,
                          int64_t bound) {
  for (int64_t b = 0; b < batch; ++b) {
    check(length[b] >= 0 && length[b] <= bound, op, "length must be between 0 and ", bound_name, " (", bound,
          "), got ", length[b], " for sequence ", b);
  }
}

inline void check_slot_values(const int32_t* start, const int32_t* length, int64_t batch, int64_t capacity) {
  check_starts("compress_ragged_", start, batch);
  check_lengths("compress_ragged_", length, batch, "the capacity", capacity);
}

inline void check_packed_values(const int32_t* cu_seqlens, const int32_t* start, int64_t batch,
                                int64_t rows) {
  const char* op = "compress_varlen";
  check(cu_seqlens[0] == 0, op, "cu_seqlens must begin with 0, got ", cu_seqlens[0]);
  for (int64_t i = 1; i <= batch; ++i) {
    check(cu_seqlens[i] >= cu_seqlens[i - 1], op, "cu_seqlens must not decrease, got ", cu_seqlens[i],
          " after ", cu_seqlens[i - 1], " at ", i);
    check(cu_seqlens[i] <= rows, op, "cu_seqlens must be at most the rows of key (", rows, "), got ",
          cu_seqlens[i], " at ", i);
  }
  check_starts(op, start, batch);
}

/// The pages of every sequence, and what is compressed of them.
struct PageTable {
  const int32_t* block_table;  // [B, max_blocks], `stride` apart
  int64_t stride, max_blocks;
  const int32_t *start, *length;  // [B]
  int64_t batch, blocks, block_size, lag_size, keep;
  bool scored = false;  // scores are carried in pages of their own, from row `sink` on
  int64_t sink = 0;

  /// Calls visit(b, j, block, written) for every block in use, in the order of the table. Written are those
  /// from the start to the new length of a sequence whose rows move.
  template <class Visit>
  void visit(const Visit& visit) const {
    for (int64_t b = 0; b < batch; ++b) {
      const RaggedSequence s = ragged_sequence(start[b], length[b], max_blocks * block_size, lag_size, keep);
      // Scores are written where no row moves, too.
      const bool writes = scored ? s.compressed > 0 : s.new_length < s.length;
      const int64_t first = scored ? std::min(sink, s.start) : s.start;
      for (int64_t j = 0; j * block_size < s.length; ++j) {
        const bool written = writes && first < (j + 1) * block_size && j * block_size < s.new_length;
        visit(b, j, block_table[b * stride + j], written);
      }
    }
  }
};

/// Every length fits its blocks, every block in use is in the pool, and no block that is written is in use
/// twice.
inline void check_page_values(const PageTable& pages) {
  const char* op = "compress_paged_";
  check_starts(op, pages.start, pages.batch);
  check_lengths(op, pages.length, pages.batch, "the rows of its blocks", pages.max_blocks * pages.block_size);
  struct Use {
    int32_t count = 0;
    bool written = false;
  };
  std::vector<Use> uses(static_cast<size_t>(pages.blocks));
  bool twice = false;
  pages.visit([&](int64_t b, int64_t j, int32_t block, bool written) {
    check(block >= 0 && block < pages.blocks, op, "block_table must hold blocks between 0 and ",
          pages.blocks - 1, ", got ", block, " at [", b, ", ", j, "]");
    Use& use = uses[static_cast<size_t>(block)];
    use.written |= written;
    twice |= ++use.count > 1;
  });
  if (!twice) return;
  int64_t found = -1, first[2] = {0, 0};
  pages.visit([&](int64_t b, int64_t j, int32_t block, bool) {
    const Use& use = uses[static_cast<size_t>(block)];
    check(block != found, op, "block_table must not hold a block twice that is written, got block ", block,
          " at [", first[0], ", ", first[1], "] and [", b, ", ", j, "]");
    if (found < 0 && use.count > 1 && use.written) found = block, first[0] = b, first[1] = j;
  });
}

/// `compact`: every position of the index lies in 0 .. length-1.
template <class T>
void check_index_values(const CompactParams<T>& p) {
  for (int64_t head = 0; head < p.batch * p.heads; ++head) {
    for (int64_t i = 0; i < p.count; ++i) {
      const int32_t position = *p.index.row(head / p.heads, head % p.heads, i);
      check(position >= 0 && position < p.length, "compact", "index must hold positions between 0 and ",
            p.length - 1, ", got ", position);
    }
  }
}

}  // namespace lagkv::cpu
