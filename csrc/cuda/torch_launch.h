// Launches kernels on the device and the stream that are current for a tensor: what is taken of torch's
// stable ABI and of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../params.h"
#include "../tensors.h"
#include "plan.h"

namespace lagkv::cuda {

/// Makes the device of `x` current, and launches on its current stream. Nothing here waits for the device.
class Launcher {
 public:
  explicit Launcher(const Tensor& x) : like_(x), guard_(x.get_device_index()) {
    const int index = x.get_device_index();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    device_.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
    device_.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  }

  const Device& device() const { return device_; }

  /// Memory that lives as long as this object; the allocator reuses it in the order of the stream.
  void* scratch(int64_t bytes) {
    scratch_.push_back(new_tensor(like_, {bytes}, ScalarType::Byte));
    return scratch_.back().data_ptr();
  }

  template <class Params>
  void operator()(void (*kernel)(Params), int64_t grid, int threads, int64_t shared_bytes,
                  const std::remove_const_t<Params>& params) const {
    kernel<<<dim3(static_cast<unsigned>(grid)), dim3(threads), static_cast<size_t>(shared_bytes), stream_>>>(
        params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  static int64_t attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Device device_;
  std::vector<Tensor> scratch_;
};

}  // namespace lagkv::cuda
