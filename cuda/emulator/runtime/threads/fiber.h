// Fibers: stacks of their own, and a switch from one to another without the operating system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace m3i::emulator {

// Memory of one fiber, with an inaccessible page below it. Local arrays of a kernel live here.
struct Stack {
  static constexpr size_t kBytes = 64 * 1024;
  uintptr_t low = 0;

  bool holds(uintptr_t address, size_t size) const {
    return address - low < kBytes && size <= kBytes - (address - low);
  }
};

// Saves the running fiber's state in *saved and continues from `target`.
void switch_fiber(void** saved, void* target);

// A fiber that calls entry(), which never returns, at its first switch. `number` spreads the
// fibers' frames over the cache's sets, which they would share if every stack began at the same
// offset.
void* make_fiber(const Stack& stack, unsigned number, void (*entry)());

// A pool of unused stacks; the last one returned is reused first, while it is still cached.
class StackPool {
 public:
  Stack take();
  void give(Stack stack) { free_.push_back(stack); }

 private:
  std::vector<Stack> free_;
};

}  // namespace m3i::emulator
