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

// Saves where the running fiber is in *saved and goes on where `target` was saved.
void switch_fiber(void** saved, void* target);

// A fiber that calls entry(), which never returns, at its first switch. `number` spreads the
// fibers' frames over the cache's sets, which they would share if every stack began at the same
// offset.
void* make_fiber(const Stack& stack, unsigned number, void (*entry)());

// Stacks that are not in use; the last one given back is the first one handed out, still cached.
class StackPool {
 public:
  Stack take();
  void give(Stack stack) { free_.push_back(stack); }

 private:
  std::vector<Stack> free_;
};

}  // namespace m3i::emulator
