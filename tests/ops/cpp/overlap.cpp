// csrc/overlap.h for ctypes (tests/ops/test_overlap.py), with the work after which its search gives up.
#include "overlap.h"

using lagkv::Footprint;

extern "C" {

int overlap(int64_t address, int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* strides,
            int64_t other_address, int64_t other_bytes, int64_t other_dims, const int64_t* other_sizes,
            const int64_t* other_strides, int64_t work) {
  const Footprint a(reinterpret_cast<const void*>(address), bytes, dims, sizes, strides);
  const Footprint b(reinterpret_cast<const void*>(other_address), other_bytes, other_dims, other_sizes,
                    other_strides);
  return lagkv::overlap(a, b, work);
}

int overlaps_itself(int64_t address, int64_t bytes, int64_t dims, const int64_t* sizes,
                    const int64_t* strides, int64_t work) {
  return lagkv::overlaps_itself(
      Footprint(reinterpret_cast<const void*>(address), bytes, dims, sizes, strides), work);
}

/// 0: no, 1: yes, 2: unknown.
int reaches(int64_t count, const int64_t* steps, const int64_t* mosts, int64_t target, int64_t work) {
  lagkv::BoundedSum sum;
  for (int64_t i = 0; i < count; ++i) sum.add(steps[i], mosts[i]);
  return static_cast<int>(sum.reaches(target, work));
}
}
