// torch's allocations of CPU memory, made where a kernel may access them while that is asked for.
#include "runtime/memory/memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

namespace {

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* memory = m3i::emulator::allocate_guarded(size);
    return {memory, memory, &m3i::emulator::free_guarded, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &m3i::emulator::free_guarded; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

}  // namespace

// Nested calls are not needed: a test asks for guarded memory, runs an op, and gives it up.
extern "C" M3I_EMULATOR_API void m3i_emulator_guard_torch(bool guard) {
  static GuardedAllocator guarded;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(guard ? &guarded : usual);
}
