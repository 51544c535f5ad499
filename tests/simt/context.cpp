#include "context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the SIMT executor's context switch is written for x86-64"
#endif

// simt_switch(void** save /*rdi*/, void* load /*rsi*/): the registers that the System V ABI makes a callee
// keep go on the stack, the stack is exchanged, and the others come back. The jump instead of `ret` keeps the
// return predictor aligned.
asm(R"(
.text
.p2align 4
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rdx
  jmpq *%rdx
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* load);

namespace simt {

namespace {
constexpr size_t kGuardBytes = 4096;

#if defined(__SANITIZE_ADDRESS__)
Context* switched_from = nullptr;
Context* switched_to = nullptr;
#endif
}  // namespace

void entered_context() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(switched_to->fake_stack, &bottom, &size);
  // The main stack's extent is known only from here.
  if (switched_from->stack_bottom == nullptr) {
    switched_from->stack_bottom = bottom;
    switched_from->stack_size = size;
  }
#endif
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  switched_from = &from;
  switched_to = &to;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
  simt_switch(&from.stack_pointer, to.stack_pointer);
  entered_context();
}

void leave_context(Context& to) {
  Context dead;
#if defined(__SANITIZE_ADDRESS__)
  switched_from = &dead;
  dead.stack_bottom = &dead;
  switched_to = &to;
  __sanitizer_start_switch_fiber(nullptr, to.stack_bottom, to.stack_size);
#endif
  simt_switch(&dead.stack_pointer, to.stack_pointer);
  __builtin_unreachable();
}

void forget_frames([[maybe_unused]] const Context& context) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(context.stack_bottom, context.stack_size);
#endif
}

Stacks::~Stacks() {
  for (unsigned char* stack : stacks_) munmap(stack - kGuardBytes, kStackBytes + kGuardBytes);
}

void Stacks::prepare(size_t index, void (*entry)(), Context& context) {
  while (stacks_.size() <= index) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of the threads");
    mprotect(memory, kGuardBytes, PROT_NONE);
    stacks_.push_back(static_cast<unsigned char*>(memory) + kGuardBytes);
  }
  unsigned char* const bottom = stacks_[index];
  context.stack_bottom = bottom;
  context.stack_size = kStackBytes;
  context.fake_stack = nullptr;
  forget_frames(context);
  // Six registers, the entry, and a return address of 0 for unwinders; at entry rsp is 8 below a multiple
  // of 16. Neighbouring stacks start at different cache sets.
  void** top = reinterpret_cast<void**>(bottom + kStackBytes - 64 - (index % 16) * 128);
  top[0] = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

bool Stacks::is_guard(uintptr_t address) const {
  for (unsigned char* stack : stacks_) {
    const auto bottom = reinterpret_cast<uintptr_t>(stack);
    if (address < bottom && address >= bottom - kGuardBytes) return true;
  }
  return false;
}

}  // namespace simt
