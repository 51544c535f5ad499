// Runs a launch: one block at a time, one fibre per thread, switching where threads have to wait for each
// other.
#pragma once

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "context.h"
#include "counters.h"
#include "memory.h"
#include "runtime.h"

namespace simt {

/// The order in which blocks, and the runnable threads of a block, take their turns. Kernels must not depend
/// on it.
enum class Order : uint8_t { kForward, kReverse, kRandom };

struct Config {
  bool detect = true;  // initialisation, races and roles; bounds, alignment and barriers are always checked
  bool count = true;
  bool races_between_blocks = true;  // off for kernels in which blocks hand data to each other behind a fence
  Order order = Order::kForward;
  uint64_t seed = 0;
  uint64_t max_accesses = 2'000'000'000;  // of a launch; more counts as a thread that never ends
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*invoke)(const void* context);  // runs the kernel for the thread that is `self`
  const void* context;
};

struct Warp;

struct Thread : Place {
  enum class State : uint8_t { kRunnable, kAtCollective, kAtBarrier, kExited };

  uint32_t id = 0, lane = 0;
  Warp* warp = nullptr;
  State state = State::kRunnable;
  uint64_t clock = 0;          // ticks at every barrier this thread takes part in
  uint64_t barrier_clock = 0;  // its value after the last __syncthreads
  uint64_t result = 0;         // of the last collective
  Site site;                   // where it waits, or of its last access
  Context context;
};

/// Lanes that wait for each other at one collective.
struct Meeting {
  Collective what;
  uint32_t mask, arrived;
  Site site;
};

struct Warp {
  uint32_t index = 0;
  uint32_t lanes = 0;  // that exist
  uint32_t exited = 0;
  uint32_t runnable = 0;
  std::vector<Meeting> meetings;  // that are not complete
  uint64_t value[32];
  uint32_t operand[32];
  int width[32];
  int bytes[32];
  // seen[u][t]: lane t's clock when lane u last met it, directly or through others, at a __syncwarp.
  uint32_t seen[32][32];
  RequestLog log;
};

class Executor {
 public:
  static Executor& instance();

  /// Runs all blocks. Throws the first Fault.
  LaunchCounts run(const Launch& launch, GlobalMemory& memory, const Config& config);

  // The functions of runtime.h, for the running thread.
  void* global_access(uintptr_t address, size_t size, Access access, const Site& site);
  void* shared_access(uintptr_t address, size_t size, Access access, const Site& site);
  void* dynamic_shared(const Site& site);
  void* static_shared(const void* variable, const char* name, size_t bytes, size_t alignment,
                      const Site& site);
  uint64_t collective(Collective what, uint32_t mask, uint64_t value, int bytes, uint32_t operand, int width,
                      const Site& site);
  int block_barrier(BlockVote vote, int predicate, const Site& site);

  /// "kind: what; kernel k, block (..), thread (..), at file:line".
  std::string fault_text(const char* kind, const Site& site, const std::string& what) const;
  /// Ends the launch from the running thread, whose frames are given up without being unwound.
  [[noreturn]] void abandon(std::exception_ptr error);
  /// Message about a hardware fault at this address; nullptr where no thread is running.
  const char* describe_signal(int signal, uintptr_t address) const;
  /// Top of the running thread's stack, whose frames are given up.
  uintptr_t landing_stack() const;

 private:
  static constexpr size_t kSharedBytes = 1 << 20;  // dynamic from 0, static variables from kStaticOrigin
  static constexpr size_t kStaticOrigin = 512 << 10;
  static constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90; 163 KiB on sm_80
  static constexpr size_t kMaxStaticBytes = 48 << 10;
  enum SharedState : uint8_t { kAbsent, kUninitialised, kInitialised };
  struct StaticVariable {
    std::string name;
    size_t offset, bytes;
  };

  Executor();
  void check_configuration(const Launch& launch) const;
  void run_block();
  void reset_shared();
  [[noreturn]] static void enter_fibre();
  void exit_thread();
  /// The running thread's turn is over: switches to another runnable one, and returns at its next turn.
  void suspend();
  Thread* next();
  void set_runnable(Warp& warp, uint32_t lanes);
  void clear_runnable(Warp& warp, uint32_t lane);
  uint32_t choose(uint32_t candidates);
  void complete(Warp& warp, const Meeting& meeting);
  uint64_t shuffle_result(const Warp& warp, const Meeting& meeting, uint32_t lane) const;
  void merge_clocks(Warp& warp, uint32_t mask);
  void check_not_awaited(const char* doing, const Site& site) const;
  [[noreturn]] void report_deadlock(const Site& site) const;
  [[noreturn]] void report_shared(size_t offset, size_t size, Access access, const Site& site) const;
  [[noreturn]] void report_race(const char* space, const std::string& where, Use use, size_t size,
                                const Conflict& conflict, const Site& site) const;
  bool in_block_order(uint64_t record) const;
  std::string thread_text(const Thread& thread) const;
  void count_access(const Site& site);
  void record_shared(size_t offset, size_t size, Use use, uint32_t site_id, const Site& site);
  std::string shared_text(size_t offset) const;
  uint64_t record(uint32_t site_id) const;
  void tick(Thread& thread) const;

  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Context main_;
  std::exception_ptr error_;

  Config config_;
  const Launch* launch_ = nullptr;
  GlobalMemory* memory_ = nullptr;
  LaunchCounts* counts_ = nullptr;
  SiteTable* sites_ = nullptr;
  uint64_t accesses_ = 0;
  uint64_t random_ = 1;

  // The block that runs.
  uint32_t thread_count_ = 0, warp_count_ = 0, exited_ = 0;
  uint32_t ready_warps_ = 0;
  uint32_t turn_warp_ = 0;
  uint32_t at_barrier_ = 0;
  Site barrier_site_;
  BlockVote barrier_vote_ = BlockVote::kNone;
  int barrier_count_ = 0, barrier_result_ = 0;
  uint64_t block_number_ = 0, first_block_number_ = 0, race_generation_ = 0;

  Pages<unsigned char> shared_data_;
  Pages<uint8_t> shared_state_;
  RaceShadow shared_race_;
  std::map<const void*, StaticVariable> static_variables_;
  size_t dynamic_end_ = 0, static_end_ = kStaticOrigin, static_bytes_ = 0;
};

}  // namespace simt
