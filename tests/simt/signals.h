// Hardware faults of a kernel (a plain dereference, a stack overflow, a division by zero) become a Fault.
#pragma once

#include <csignal>

namespace simt {

/// Catches the signals of hardware faults while it lives. Signals of other code than a kernel's go where they
/// went before.
class SignalScope {
 public:
  SignalScope();
  ~SignalScope();
  SignalScope(const SignalScope&) = delete;
  SignalScope& operator=(const SignalScope&) = delete;
};

}  // namespace simt
