#include "runtime/launch/signals.h"

#include "runtime/launch/report.h"
#include "runtime/memory/memory.h"
#include "runtime/threads/scheduler.h"

#include <string>

namespace m3i::emulator {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction former[3];

std::string describe(int signal, uintptr_t address) {
  if (signal == SIGFPE) return "integer division by zero, or of the lowest number by -1";
  constexpr uintptr_t kNear = 4096;
  if (running->stack.low - address <= kNear) {
    return "local variables of more than " + std::to_string(Stack::kBytes / 1024) + " KiB";
  }
  return "access of " + hex(address) + ", " + describe_outside(address);
}

// The kernel's code was interrupted where it touched memory or divided, not inside malloc, so that
// the report may be put together here.
void on_fault(int signal, siginfo_t* info, void*) {
  if (!running) {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &former[i], nullptr);
    return;  // the instruction is tried again, and the former handler called
  }
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const bool divided = signal == SIGFPE;
  record_failure(divided ? cudaErrorLaunchFailure : cudaErrorIllegalAddress,
                 describe(signal, address), divided ? at(address + 1) : Site{});
  siglongjmp(FaultHandler::leave, 1);
}

}  // namespace

sigjmp_buf FaultHandler::leave;

FaultHandler::FaultHandler() {
  // Of its own: the fault may be that the fiber's is full.
  alignas(16) static char memory[256 * 1024];
  stack_t stack{};
  stack.ss_sp = memory;
  stack.ss_size = sizeof(memory);
  sigaltstack(&stack, &former_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &former[i]);
}

FaultHandler::~FaultHandler() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &former[i], nullptr);
  sigaltstack(&former_stack_, nullptr);
}

}  // namespace m3i::emulator
