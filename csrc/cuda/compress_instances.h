// The instantiations of compress_kernel for one storage type, which a source file each names.
#pragma once

#include "launches.h"
#include "torch_launch.h"

namespace lagkv::cuda {

template <class T, class Real>
void run_compress(Launcher& launcher, const CompressParams<T>& args, Real* score) {
  launch_compress<T>(
      args, score, launcher.device(), [&](int64_t bytes) { return launcher.scratch(bytes); }, launcher);
}

}  // namespace lagkv::cuda

#define LAGKV_COMPRESS_INSTANCES(T)                                   \
  template void lagkv::cuda::run_compress<T, lagkv::cuda::RealOf<T>>( \
      lagkv::cuda::Launcher&, const lagkv::CompressParams<T>&, lagkv::cuda::RealOf<T>*);
