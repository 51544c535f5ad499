// Occupancy of compiled kernels, from the compiler's own register counts, by NVIDIA's calculator
// (cuda_occupancy.h): no GPU needed. Reads lines "capability registers static_shared threads
// dynamic_shared", or "capability registers static_shared elements lanes chunks element_size dim lag_size
// ragged blend" for a scoring kernel, whose threads and dynamic shared memory the launch planner knows.
// Writes "blocks_per_multiprocessor warps_of_max_percent dynamic_shared planned_blocks" for each.
#include <cuda_occupancy.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/cuda/plan.h"

namespace {

cudaOccDeviceProp device_of(int capability) {
  cudaOccDeviceProp device;
  device.computeMajor = capability / 10;
  device.computeMinor = capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.reservedSharedMemPerBlock = 1 << 10;
  if (capability == 80) {  // A100
    device.sharedMemPerMultiprocessor = 164 << 10;
    device.sharedMemPerBlockOptin = 163 << 10;
    device.numSms = 108;
  } else if (capability == 90) {  // H100 SXM
    device.sharedMemPerMultiprocessor = 228 << 10;
    device.sharedMemPerBlockOptin = 227 << 10;
    device.numSms = 132;
  } else {
    std::cerr << "occupancy: no device is known for compute capability " << capability
              << " (80 and 90 are)\n";
    std::exit(2);
  }
  return device;
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::vector<int> n;
    for (int value; words >> value;) n.push_back(value);
    if (n.size() != 5 && n.size() != 11) {
      std::cerr << "occupancy: expected 5 or 11 numbers, got '" << line << "'\n";
      return 2;
    }
    int threads = n[3];
    size_t dynamic = n[4];
    int planned = 1;
    if (n.size() == 11) {
      lagkv::cuda::Device limits;
      limits.shared_per_multiprocessor = static_cast<int64_t>(device_of(n[0]).sharedMemPerMultiprocessor);
      threads = lagkv::cuda::kThreads;
      const lagkv::cuda::RowShape shape{n[3], n[4], n[5]};
      const bool ragged = n[9] != 0, blend = n[10] != 0;
      // Wider rows take another layout (row_shape).
      const int64_t dim = blend && n[6] == 8 ? std::min<int64_t>(n[7], lagkv::cuda::kBlendDim) : n[7];
      dynamic = lagkv::cuda::plan_storage(shape, n[6], dim, dim, n[8], ragged, limits, blend).shared_bytes;
      planned =
          lagkv::cuda::planned_blocks(shape, n[6], static_cast<int64_t>(dynamic), ragged, limits, blend);
    }
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = n[1];
    kernel.sharedSizeBytes = n[2];
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
    kernel.maxDynamicSharedSizeBytes = 48 << 10;
    kernel.numBlockBarriers = 1;
    const cudaOccDeviceProp device = device_of(n[0]);
    const cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic);
    if (error != CUDA_OCC_SUCCESS) {
      std::cerr << "occupancy: error " << error << " for '" << line << "'\n";
      return 2;
    }
    const int blocks = result.activeBlocksPerMultiprocessor;
    std::printf("%d %d %zu %d\n", blocks, blocks * threads * 100 / device.maxThreadsPerMultiprocessor,
                dynamic, planned);
  }
}
