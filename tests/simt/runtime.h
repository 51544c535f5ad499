// Interface of the executor for device.h: who is running, and one function for every kind of thing a thread
// can do that others see.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "fault.h"
#include "memory.h"

namespace simt {

/// Place of the running thread. The executor sets these whenever it switches.
struct Place {
  uint3 thread_index;
};
extern Place* self;
extern uint3 block_index;
extern dim3 block_dim, grid_dim;

// None of these throws into the kernel: a fault ends the launch without coming back. So the compiler sees
// plain calls, as on a device.

/// Check, count, and give the host address of what the kernel wants to access.
void* global_access(const void* p, size_t size, Access access, const Site& site) noexcept;
void* shared_access(const void* p, size_t size, Access access, const Site& site) noexcept;
/// A read-modify-write of either space.
void* atomic_access(const void* p, size_t size, const Site& site) noexcept;

/// The kernels' address of dynamic shared memory.
void* dynamic_shared(const Site& site) noexcept;
/// The kernels' address of a static shared variable. `variable` is its identity: one address per declaration
/// and instantiation.
void* static_shared(const void* variable, const char* name, size_t bytes, size_t alignment,
                    const Site& site) noexcept;

enum class Collective : uint8_t {
  kBarrier,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kReduceAdd,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kReduceMin,
  kReduceMax,
  kReduceMinSigned,
  kReduceMaxSigned,
};
/// Waits until all lanes of `mask` are here, and returns this lane's result. `operand` is the lane, delta or
/// lane mask of a shuffle.
uint64_t collective(Collective what, uint32_t mask, uint64_t value, int bytes, uint32_t operand, int width,
                    const Site& site) noexcept;

enum class BlockVote : uint8_t { kNone, kCount, kAnd, kOr };
int block_barrier(BlockVote vote, int predicate, const Site& site) noexcept;
[[noreturn]] void trap(const Site& site) noexcept;

}  // namespace simt
