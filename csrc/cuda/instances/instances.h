// The instantiations of the scoring kernels for one storage type, which a source file each names: they are
// what takes long to compile.
#pragma once

#include "../launch.h"
#include "../torch_launch.h"

namespace lagkv::cuda {

template <class T, class Real>
void run_compress(Launcher& launcher, const CompressParams<T>& args, const ScoreTarget<Real>& score) {
  launch_compress<T>(
      args, score, launcher.device(), [&](int64_t bytes) { return launcher.scratch(bytes); }, launcher);
}

template <class T, class Real>
void run_ragged(Launcher& launcher, const RaggedParams<T>& args, const SequenceTable& table,
                const ScoreTarget<Real>& score) {
  launch_ragged<T>(
      args, table, score, launcher.device(), [&](int64_t bytes) { return launcher.scratch(bytes); },
      launcher);
}

template <class T>
void run_blocks(Launcher& launcher, const BlocksParams<T>& args) {
  launch_blocks<T>(args, launcher.device(), [&](int64_t bytes) { return launcher.scratch(bytes); }, launcher);
}

}  // namespace lagkv::cuda

#define LAGKV_INSTANCES(T)                                                                      \
  template void lagkv::cuda::run_compress<T, lagkv::cuda::RealOf<T>>(                           \
      lagkv::cuda::Launcher&, const lagkv::CompressParams<T>&,                                  \
      const lagkv::cuda::ScoreTarget<lagkv::cuda::RealOf<T>>&);                                 \
  template void lagkv::cuda::run_ragged<T, lagkv::cuda::RealOf<T>>(                             \
      lagkv::cuda::Launcher&, const lagkv::RaggedParams<T>&, const lagkv::cuda::SequenceTable&, \
      const lagkv::cuda::ScoreTarget<lagkv::cuda::RealOf<T>>&);                                 \
  template void lagkv::cuda::run_blocks<T>(lagkv::cuda::Launcher&, const lagkv::BlocksParams<T>&);
