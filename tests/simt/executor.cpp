#include "executor.h"

#include <algorithm>
#include <cstring>

#include "signals.h"

namespace simt {

Place* self = nullptr;
uint3 block_index;
dim3 block_dim, grid_dim;

namespace {

uint64_t next_random(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1Du;
}

std::string index_text(const uint3& i) { return text("(", i.x, ", ", i.y, ", ", i.z, ")"); }

}  // namespace

std::string site_text(const Site& site) {
  return text(site.file_name(), ":", site.line(), " (", site.function_name(), ")");
}

void fail(const char* kind, const Site& site, const std::string& what) {
  throw Fault(Executor::instance().fault_text(kind, site, what));
}

Executor& Executor::instance() {
  static Executor executor;
  return executor;
}

Executor::Executor()
    : shared_data_(kSharedBytes), shared_state_(kSharedBytes + 16), shared_race_(kSharedBytes) {
  AddressSpace::reserve();
}

std::string Executor::thread_text(const Thread& thread) const {
  return "thread " + index_text(thread.thread_index);
}

std::string Executor::fault_text(const char* kind, const Site& site, const std::string& what) const {
  std::string all = text(kind, ": ", what, "; kernel ", launch_ != nullptr ? launch_->kernel : "(none)");
  if (self != nullptr) {
    const Thread& thread = *static_cast<const Thread*>(self);
    all += text(", block ", index_text(block_index), ", ", thread_text(thread), " (warp ", thread.warp->index,
                ", lane ", thread.lane, ")");
  }
  return site.line() == 0 ? all : all + ", at " + site_text(site);
}

// ---- Launch ----

void Executor::check_configuration(const Launch& launch) const {
  const auto refuse = [](const std::string& what) { fail("bad-launch", Site(), what); };
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    refuse(text("a block has 1 to 1024 threads, got ", block.x, " x ", block.y, " x ", block.z));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    refuse(text("a grid has 1 to 2147483647 x 65535 x 65535 blocks, got ", grid.x, " x ", grid.y, " x ",
                grid.z));
  }
  if (launch.shared_bytes > kMaxSharedBytes) {
    refuse(
        text("a block has at most ", kMaxSharedBytes, " bytes of shared memory, got ", launch.shared_bytes));
  }
}

LaunchCounts Executor::run(const Launch& launch, GlobalMemory& memory, const Config& config) {
  if (launch_ != nullptr) throw std::runtime_error("simt: a launch is already running");
  LaunchCounts counts;
  counts.kernel = launch.kernel;
  SiteTable sites(counts);
  struct Scope {
    Executor& executor;
    ~Scope() {
      executor.launch_ = nullptr;
      executor.memory_ = nullptr;
      executor.counts_ = nullptr;
      executor.sites_ = nullptr;
      executor.error_ = nullptr;
      self = nullptr;
    }
  } scope{*this};
  launch_ = &launch;
  memory_ = &memory;
  counts_ = &counts;
  sites_ = &sites;
  config_ = config;
  check_configuration(launch);

  grid_dim = launch.grid;
  block_dim = launch.block;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  for (int i = 0; i < 3; ++i) {
    counts.grid[i] = (&grid_dim.x)[i];
    counts.block[i] = (&block_dim.x)[i];
  }
  counts.dynamic_shared_bytes = launch.shared_bytes;
  accesses_ = 0;
  random_ = config.seed * 2 + 1;
  static_variables_.clear();
  std::memset(&shared_state_[kStaticOrigin], kAbsent, static_end_ - kStaticOrigin);
  static_end_ = kStaticOrigin;
  static_bytes_ = 0;

  if (blocks > Record::kMaxBlock)
    fail("bad-launch", Site(), text("the executor runs at most 16777215 blocks, got ", blocks));
  if (block_number_ + blocks > Record::kMaxBlock) {
    block_number_ = 0;
    ++race_generation_;
    shared_race_.clear();
  }
  memory.clear_races(race_generation_);
  memory.start_launch();
  first_block_number_ = block_number_ + 1;

  thread_count_ = launch.block.x * launch.block.y * launch.block.z;
  warp_count_ = (thread_count_ + 31) / 32;
  if (threads_.size() < thread_count_) threads_.resize(thread_count_);
  if (warps_.size() < warp_count_) warps_.resize(warp_count_);
  for (uint32_t id = 0; id < thread_count_; ++id) {
    Thread& thread = threads_[id];
    thread.id = id;
    thread.lane = id % 32;
    thread.warp = &warps_[id / 32];
    thread.thread_index = {id % block_dim.x, id / block_dim.x % block_dim.y,
                           id / (block_dim.x * block_dim.y)};
  }

  SignalScope signals;
  // A random order of the blocks that needs no table: i -> (a i + b) mod blocks with a coprime to blocks.
  uint64_t step = 1, offset = 0;
  if (config.order == Order::kRandom) {
    step = next_random(random_) % blocks | 1;
    while (std::__gcd(step, blocks) != 1) step += 2;
    offset = next_random(random_) % blocks;
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = config.order == Order::kForward   ? i
                           : config.order == Order::kReverse ? blocks - 1 - i
                                                             : (step * i + offset) % blocks;
    block_index = {static_cast<uint32_t>(block % grid_dim.x),
                   static_cast<uint32_t>(block / grid_dim.x % grid_dim.y),
                   static_cast<uint32_t>(block / grid_dim.x / grid_dim.y)};
    run_block();
  }
  counts.static_shared_bytes = static_bytes_;
  return counts;
}

void Executor::run_block() {
  ++block_number_;
  exited_ = at_barrier_ = 0;
  ready_warps_ = 0;
  reset_shared();
  for (uint32_t w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    const uint32_t lanes = std::min(32u, thread_count_ - 32 * w);
    warp.index = w;
    warp.lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.exited = warp.runnable = 0;
    warp.meetings.clear();
    std::memset(warp.seen, 0, sizeof(warp.seen));
    warp.log.restart();
    set_runnable(warp, warp.lanes);
  }
  for (uint32_t id = 0; id < thread_count_; ++id) {
    Thread& thread = threads_[id];
    thread.state = Thread::State::kRunnable;
    thread.clock = 1;
    thread.barrier_clock = 0;
    thread.site = Site();
    stacks_.prepare(id, &enter_fibre, thread.context);
  }
  turn_warp_ = choose(ready_warps_);
  Thread* const first = next();
  self = first;
  ++counts_->switches;
  switch_context(main_, first->context);
  if (error_ != nullptr) std::rethrow_exception(error_);
  self = nullptr;
  for (uint32_t w = 0; w < warp_count_; ++w) warps_[w].log.flush(*counts_);
}

void Executor::enter_fibre() {
  entered_context();
  Executor& executor = instance();
  try {
    executor.launch_->invoke(executor.launch_->context);
    executor.exit_thread();
  } catch (...) {
    executor.error_ = std::current_exception();
  }
  Thread* following = nullptr;
  if (executor.error_ == nullptr && executor.exited_ < executor.thread_count_) following = executor.next();
  if (following == nullptr) leave_context(executor.main_);
  self = following;
  ++executor.counts_->switches;
  leave_context(following->context);
}

void Executor::exit_thread() {
  Thread& me = *static_cast<Thread*>(self);
  check_not_awaited("exits", Site());
  if (at_barrier_ != 0) {
    fail("barrier-divergence", Site(),
         text("a thread exits while ", at_barrier_, " threads wait at __syncthreads at ",
              site_text(barrier_site_)));
  }
  me.state = Thread::State::kExited;
  me.warp->exited |= 1u << me.lane;
  clear_runnable(*me.warp, me.lane);
  ++exited_;
  if (exited_ < thread_count_ && ready_warps_ == 0) report_deadlock(Site());
}

void Executor::abandon(std::exception_ptr error) {
  error_ = std::move(error);
  leave_context(main_);
}

// ---- Turns ----

void Executor::set_runnable(Warp& warp, uint32_t lanes) {
  warp.runnable |= lanes;
  ready_warps_ |= 1u << warp.index;
}

void Executor::clear_runnable(Warp& warp, uint32_t lane) {
  warp.runnable &= ~(1u << lane);
  if (warp.runnable == 0) ready_warps_ &= ~(1u << warp.index);
}

uint32_t Executor::choose(uint32_t candidates) {
  switch (config_.order) {
    case Order::kForward: break;
    case Order::kReverse: return 31 - static_cast<uint32_t>(__builtin_clz(candidates));
    case Order::kRandom: {
      const auto turn = static_cast<uint32_t>(next_random(random_) >> 59);
      const uint32_t rotated = candidates >> turn | candidates << (-turn & 31);
      return (static_cast<uint32_t>(__builtin_ctz(rotated)) + turn) & 31;
    }
  }
  return static_cast<uint32_t>(__builtin_ctz(candidates));
}

Thread* Executor::next() {
  if (ready_warps_ == 0) return nullptr;
  // A warp keeps its turn while it can go on, unless the order is random.
  if (config_.order == Order::kRandom || (ready_warps_ >> turn_warp_ & 1) == 0)
    turn_warp_ = choose(ready_warps_);
  return &threads_[turn_warp_ * 32 + choose(warps_[turn_warp_].runnable)];
}

void Executor::suspend() {
  Thread& me = *static_cast<Thread*>(self);
  Thread* const following = next();
  if (following == nullptr) report_deadlock(me.site);
  self = following;
  ++counts_->switches;
  switch_context(me.context, following->context);
}

void Executor::report_deadlock(const Site& site) const {
  std::string who;
  size_t listed = 0;
  for (uint32_t id = 0; id < thread_count_; ++id) {
    const Thread& thread = threads_[id];
    if (thread.state == Thread::State::kExited || ++listed > 4) continue;
    who += text("; ", thread_text(thread),
                thread.state == Thread::State::kAtBarrier ? " at __syncthreads" : " at a warp collective",
                " at ", site_text(thread.site));
  }
  fail("deadlock", site, text("no thread can go on, ", thread_count_ - exited_, " wait", who));
}

// ---- Block barrier ----

void Executor::tick(Thread& thread) const {
  if (++thread.clock > Record::kMaxClock) {
    fail("no-progress", thread.site, "a thread took part in more than a million barriers");
  }
}

int Executor::block_barrier(BlockVote vote, int predicate, const Site& site) {
  Thread& me = *static_cast<Thread*>(self);
  me.site = site;
  check_not_awaited("waits at __syncthreads", site);
  if (exited_ != 0) {
    const auto gone = std::find_if(threads_.begin(), threads_.begin() + thread_count_,
                                   [](const Thread& t) { return t.state == Thread::State::kExited; });
    fail("barrier-divergence", site,
         text("__syncthreads is reached while ", exited_, " threads of the block have exited, ",
              thread_text(*gone), " first"));
  }
  if (at_barrier_ == 0) {
    barrier_site_ = site;
    barrier_vote_ = vote;
    barrier_count_ = 0;
  } else if (vote != barrier_vote_ || !same_site(site, barrier_site_)) {
    fail("barrier-divergence", site,
         text("__syncthreads is reached while ", at_barrier_, " threads wait at another one, at ",
              site_text(barrier_site_)));
  }
  barrier_count_ += predicate != 0;
  if (++at_barrier_ < thread_count_) {
    me.state = Thread::State::kAtBarrier;
    clear_runnable(*me.warp, me.lane);
    suspend();
    return barrier_result_;
  }
  at_barrier_ = 0;
  barrier_result_ = vote == BlockVote::kAnd  ? barrier_count_ == static_cast<int>(thread_count_)
                    : vote == BlockVote::kOr ? barrier_count_ != 0
                                             : barrier_count_;
  ++counts_->barriers;
  for (uint32_t id = 0; id < thread_count_; ++id) {
    tick(threads_[id]);
    threads_[id].barrier_clock = threads_[id].clock;
    threads_[id].state = Thread::State::kRunnable;
  }
  for (uint32_t w = 0; w < warp_count_; ++w) {
    warps_[w].log.flush(*counts_);
    set_runnable(warps_[w], warps_[w].lanes);
  }
  return barrier_result_;
}

// ---- The functions of runtime.h ----

namespace {

/// Calls f with the executor for the running thread. A Fault is stored after everything on its way has been
/// cleaned up, and ends the launch: the thread, whose frames hold nothing but the kernel's own, does not go
/// on.
template <class F>
auto guarded(const F& f) noexcept {
  Executor& executor = Executor::instance();
  std::exception_ptr error;
  try {
    return f(executor);
  } catch (...) {
    error = std::current_exception();
  }
  executor.abandon(std::move(error));
}

}  // namespace

void* global_access(const void* p, size_t size, Access access, const Site& site) noexcept {
  return guarded(
      [&](Executor& e) { return e.global_access(reinterpret_cast<uintptr_t>(p), size, access, site); });
}
void* shared_access(const void* p, size_t size, Access access, const Site& site) noexcept {
  return guarded(
      [&](Executor& e) { return e.shared_access(reinterpret_cast<uintptr_t>(p), size, access, site); });
}
void* atomic_access(const void* p, size_t size, const Site& site) noexcept {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return AddressSpace::is_shared(address) ? shared_access(p, size, Access::kAtomic, site)
                                          : global_access(p, size, Access::kAtomic, site);
}
void* dynamic_shared(const Site& site) noexcept {
  return guarded([&](Executor& e) { return e.dynamic_shared(site); });
}
void* static_shared(const void* variable, const char* name, size_t bytes, size_t alignment,
                    const Site& site) noexcept {
  return guarded([&](Executor& e) { return e.static_shared(variable, name, bytes, alignment, site); });
}
uint64_t collective(Collective what, uint32_t mask, uint64_t value, int bytes, uint32_t operand, int width,
                    const Site& site) noexcept {
  return guarded([&](Executor& e) { return e.collective(what, mask, value, bytes, operand, width, site); });
}
int block_barrier(BlockVote vote, int predicate, const Site& site) noexcept {
  return guarded([&](Executor& e) { return e.block_barrier(vote, predicate, site); });
}
void trap(const Site& site) noexcept {
  guarded([&](Executor&) { fail("trap", site, "__trap was called"); });
  __builtin_unreachable();
}

}  // namespace simt
