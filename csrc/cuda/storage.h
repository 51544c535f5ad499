// From the shape of a row and the device: how lanes share a row, and the memory that a scoring block needs.
// Plain C++, as plan.h.
//
// The number of threads and the way lanes share a row depend on dtype, D and alignment alone, never on B, H,
// N or the device: a partition's scores are bit for bit the same in every batch, on every card.
#pragma once

#include <algorithm>
#include <cstdint>

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

/// Resources that a launch may use. The defaults are those that every architecture since sm_80 has.
struct Device {
  int64_t multiprocessors = 108;
  int64_t shared_per_block = 48 * 1024;
  int64_t shared_per_multiprocessor = 164 * 1024;
};

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
  int64_t statistics;  // [2, padded_lag] Real: of key and value; the first (smoothed: the second) becomes the
                       // ordered scores (wide: [3, ..], blend: [5, ..])
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

}  // namespace lagkv::cuda
