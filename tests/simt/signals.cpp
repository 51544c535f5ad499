#include "signals.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <iterator>
#include <memory>
#include <string>

#include "executor.h"

namespace simt {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr size_t kStackBytes = 64 << 10;

struct sigaction previous_actions[std::size(kSignals)];
stack_t previous_stack;
std::array<unsigned char, kStackBytes> signal_stack;

int caught_signal = 0;
uintptr_t caught_address = 0;

/// Point at which the thread continues after the handler: on its own stack, whose frames are given up, so
/// nothing is unwound.
[[noreturn]] void land() {
  Executor& executor = Executor::instance();
  const char* const what = executor.describe_signal(caught_signal, caught_address);
  const Site last = static_cast<const Thread*>(self)->site;
  const char* const kind = caught_signal == SIGFPE ? "arithmetic" : "plain-access";
  const char* const after = last.line() != 0 ? " (the line below is the last one seen before)" : "";
  std::exception_ptr error =
      std::make_exception_ptr(Fault(executor.fault_text(kind, last, std::string(what) + after)));
  executor.abandon(std::move(error));
}

void on_signal(int signal, siginfo_t* info, void* raw_context) {
  if (self == nullptr) {  // not a kernel's: let it happen again under the handler that was there
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      if (kSignals[i] == signal) sigaction(signal, &previous_actions[i], nullptr);
    }
    return;
  }
  caught_signal = signal;
  caught_address = reinterpret_cast<uintptr_t>(info->si_addr);
  auto* const context = static_cast<ucontext_t*>(raw_context);
  // As if `land` had been called: the stack pointer is 8 below a multiple of 16.
  context->uc_mcontext.gregs[REG_RSP] =
      static_cast<greg_t>(Executor::instance().landing_stack() / 16 * 16 - 8);
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&land);
}

}  // namespace

SignalScope::SignalScope() {
  stack_t stack{};
  stack.ss_sp = signal_stack.data();
  stack.ss_size = signal_stack.size();
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = &on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
}

SignalScope::~SignalScope() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

const char* Executor::describe_signal(int signal, uintptr_t address) const {
  if (signal == SIGFPE) return "an integer division by zero or its overflow";
  if (signal == SIGILL) return "an unreachable place was reached, or an instruction that this CPU lacks";
  if (AddressSpace::contains(address)) {
    return AddressSpace::is_shared(address)
               ? "shared memory was accessed without ld_shared / st_shared / an atomic"
               : "global memory was accessed without ld_global* / st_global* / an atomic";
  }
  if (stacks_.is_guard(address)) return "the thread's stack of 128 KiB overflowed";
  if (address < 65536) return "a null pointer was dereferenced";
  return "an address outside every buffer was dereferenced";
}

uintptr_t Executor::landing_stack() const {
  const Context& context = static_cast<const Thread*>(self)->context;
  forget_frames(context);
  return reinterpret_cast<uintptr_t>(context.stack_bottom) + context.stack_size;
}

}  // namespace simt
