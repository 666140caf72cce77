// Reports of processor faults in a kernel, which come from code without instrumentation (the C
// library's), from a stack overflow, or from a division.
#pragma once

#include <csetjmp>
#include <csignal>

namespace m3i::emulator {

// During its lifetime a fault in a kernel is recorded and control jumps to `leave`, set by
// sigsetjmp; a fault in host code is handled as before.
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
