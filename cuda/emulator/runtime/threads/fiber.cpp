#include "runtime/threads/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

// M3I_EMULATOR_UCONTEXT chooses the portable switch where the other exists, to test it.
#if !defined(__x86_64__) && !defined(M3I_EMULATOR_UCONTEXT)
#define M3I_EMULATOR_UCONTEXT
#endif

#ifdef M3I_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace m3i::emulator {

namespace {

// Where a new fiber's frames begin: 16-byte aligned, at one of 32 cache lines.
uintptr_t first_frame(const Stack& stack, unsigned number) {
  return stack.low + Stack::kBytes - 64 * (1 + number % 32);
}

}  // namespace

#ifndef M3I_EMULATOR_UCONTEXT

// The System V ABI lets a call change all but these six registers and the stack pointer. (It also
// keeps the rounding mode, which no kernel changes.)
asm(R"(
.text
.hidden m3i_emulator_switch
.globl m3i_emulator_switch
.type m3i_emulator_switch, @function
m3i_emulator_switch:
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
  ret
.size m3i_emulator_switch, . - m3i_emulator_switch
)");

extern "C" __attribute__((visibility("hidden"))) void m3i_emulator_switch(void** saved,
                                                                          void* target);

void switch_fiber(void** saved, void* target) { m3i_emulator_switch(saved, target); }

void* make_fiber(const Stack& stack, unsigned number, void (*entry)()) {
  // What the switch pops: six registers, then entry as the return address; above it the null return
  // address of entry's own frame, where a debugger's backtrace ends.
  auto* frame = reinterpret_cast<uintptr_t*>(first_frame(stack, number)) - 8;
  for (int i = 0; i < 6; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  frame[7] = 0;
  return frame;
}

#else

// A saved position is a ucontext_t: of a fiber at the top of its stack, of the thread that runs
// them in a variable.
namespace {
ucontext_t outside;
}

void switch_fiber(void** saved, void* target) {
  if (*saved == nullptr) *saved = &outside;
  swapcontext(static_cast<ucontext_t*>(*saved), static_cast<ucontext_t*>(target));
}

void* make_fiber(const Stack& stack, unsigned number, void (*entry)()) {
  const uintptr_t at = (first_frame(stack, number) - sizeof(ucontext_t)) & ~uintptr_t{63};
  auto* context = new (reinterpret_cast<void*>(at)) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = reinterpret_cast<void*>(stack.low);
  context->uc_stack.ss_size = at - stack.low;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

Stack StackPool::take() {
  if (!free_.empty()) {
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + Stack::kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return {reinterpret_cast<uintptr_t>(memory) + page};
}

}  // namespace m3i::emulator
