// Faults of the processor while a kernel runs, as reports: they come from code without
// instrumentation (the C library's), from a stack that is full, or from a division.
#pragma once

#include <csetjmp>
#include <csignal>

namespace m3i::emulator {

// While it lives, a fault in a kernel is recorded and control goes to where `leave` was set, by
// sigsetjmp; a fault in host code goes where it went before.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

  static sigjmp_buf leave;

 private:
  stack_t former_stack_;
};

}  // namespace m3i::emulator
