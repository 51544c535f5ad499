// What the CPU operators need of torch's stable ABI: new tensors, choice of kernels by
// dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <vector>

#include "checks.h"
#include "torch_error.h"
#include "types.h"

namespace lagkv::cpu {

/// Calls body(T()) with the storage type of x, which the checks have found to be a floating one.
template <class Body>
void by_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return body(Half());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Float: return body(float());
    default: return body(double());
  }
}

/// Contiguous, on the CPU, uninitialised. Not torch::stable::new_empty, which boxes its arguments for the
/// dispatcher and takes a microsecond more.
inline Tensor new_tensor(const int64_t* sizes, int64_t dims, ScalarType type) {
  std::array<int64_t, 8> few;
  std::vector<int64_t> many;
  int64_t* strides = few.data();
  if (dims > static_cast<int64_t>(few.size())) {
    many.resize(static_cast<size_t>(dims));
    strides = many.data();
  }
  for (int64_t dim = dims - 1, stride = 1; dim >= 0; stride *= std::max<int64_t>(sizes[dim], 1), --dim)
    strides[dim] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

inline ScalarType arithmetic_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace lagkv::cpu
