// Chooses the instruction set of the CPU kernels: the widest that the machine has, or LAGKV_CPU_ISA.
#pragma once

#include "kernel_set.h"

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
