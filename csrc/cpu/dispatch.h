// Which instruction set the CPU kernels use: the widest the machine has, or what LAGKV_CPU_ISA names.
#pragma once

#include "tile.h"

namespace lagkv::cpu {

namespace portable {
extern const KernelSet kernel_set;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelSet kernel_set;
}
namespace avx512 {
extern const KernelSet kernel_set;
}
#endif

struct InstructionSet {
  const char* name;
  const KernelSet* kernels;
};

/// Reads LAGKV_CPU_ISA at every call, so that one process can compare levels. Throws std::runtime_error where
/// it names no level this machine supports.
const InstructionSet& instruction_set();

}  // namespace lagkv::cpu
