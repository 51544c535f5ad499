#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace lagkv::cpu {

namespace {

/// The instruction sets of this machine, widest first.
const std::vector<InstructionSet>& supported() {
  static const std::vector<InstructionSet> levels = [] {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
                          __builtin_cpu_supports("popcnt");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (has_avx512) found.push_back({"avx512", &avx512::kernel_set});
    if (has_avx2) found.push_back({"avx2", &avx2::kernel_set});
#endif
    found.push_back({"portable", &portable::kernel_set});
    return found;
  }();
  return levels;
}

}  // namespace

const InstructionSet& instruction_set() {
  const std::vector<InstructionSet>& levels = supported();
  const char* wish = std::getenv("LAGKV_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return levels.front();
  for (const InstructionSet& level : levels) {
    if (std::strcmp(level.name, wish) == 0) return level;
  }
  std::string names;
  for (const InstructionSet& level : levels) names += (names.empty() ? "" : ", ") + std::string(level.name);
  throw std::runtime_error("lagkv: LAGKV_CPU_ISA must be one of those this machine supports (" + names +
                           "), got '" + wish + "'");
}

}  // namespace lagkv::cpu
