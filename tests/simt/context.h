// Fibres: a hand-written context switch and guarded stacks that are reused from block to block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

/// Point at which a suspended flow of control continues: its stack pointer, with the callee-saved registers
/// on that stack.
struct Context {
  void* stack_pointer = nullptr;
  // Needed by AddressSanitizer to follow a switch; unused otherwise.
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

/// Suspends `from` and continues `to`. Returns when somebody switches back to `from`.
void switch_context(Context& from, Context& to);

/// As switch_context for a flow of control that never goes on.
[[noreturn]] void leave_context(Context& to);

/// Must be the first call of a new flow of control.
void entered_context();

/// The frames on this stack are given up: nothing of them may stay marked for AddressSanitizer.
void forget_frames(const Context& context);

/// Stacks of kStackBytes each, with an inaccessible page below every one of them.
class Stacks {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  ~Stacks();
  /// Makes `context` start at `entry` on stack number `index` when it is switched to. `entry` must not
  /// return.
  void prepare(size_t index, void (*entry)(), Context& context);
  /// Returns whether the address is in the guard page of a stack: an overflow.
  bool is_guard(uintptr_t address) const;

 private:
  std::vector<unsigned char*> stacks_;
};

}  // namespace simt
