// The instantiations of the ragged kernels for one storage type, which a source file each names.
#pragma once

#include "ragged_launches.h"
#include "torch_launch.h"

namespace lagkv::cuda {

template <class T>
void run_ragged(Launcher& launcher, const RaggedParams<T>& args, const SequenceTable& table) {
  launch_ragged<T>(
      args, table, launcher.device(), [&](int64_t bytes) { return launcher.scratch(bytes); }, launcher);
}

}  // namespace lagkv::cuda

#define LAGKV_RAGGED_INSTANCES(T)                                                                 \
  template void lagkv::cuda::run_ragged<T>(lagkv::cuda::Launcher&, const lagkv::RaggedParams<T>&, \
                                           const lagkv::cuda::SequenceTable&);
