// New tensors on the device of another one, through torch's stable C interface.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <vector>

#include "torch_error.h"

namespace lagkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Contiguous, uninitialised. Not torch::stable::empty, which boxes its arguments for the dispatcher and
/// takes a microsecond more.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType type) {
  std::array<int64_t, 8> few;
  std::vector<int64_t> many;
  int64_t* strides = few.data();
  if (dims > static_cast<int64_t>(few.size())) {
    many.resize(static_cast<size_t>(dims));
    strides = many.data();
  }
  for (int64_t dim = dims - 1, stride = 1; dim >= 0; stride *= std::max<int64_t>(sizes[dim], 1), --dim)
    strides[dim] = stride;
  int32_t device_type = 0;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_tensor(like, sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

/// The type that arithmetic on elements of x runs in: float64 for float64, float32 for all else.
inline ScalarType arithmetic_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace lagkv
