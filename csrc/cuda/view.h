// A tensor as pointer, sizes and strides: how tensors reach the launch code, from torch and from the
// executor's bindings.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lagkv::cuda {

/// A [B, H, N, D] tensor (an index is [B, H, K, 1]). Strides in elements.
struct View {
  void* data = nullptr;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 1};

  template <class T>
  StridedRows<T> rows() const {
    // The stride of a dimension of one element is never used; it must not spoil the alignment of the others.
    const auto step = [&](int dim) { return size[dim] > 1 ? stride[dim] : 0; };
    return {static_cast<T*>(data), step(0), step(1), step(2), size[3]};
  }
};

}  // namespace lagkv::cuda
