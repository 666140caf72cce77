#include "emulator/instructions/counter.h"

#include "runtime/memory/race.h"
#include "runtime/threads/scheduler.h"

namespace m3i::emulator {

namespace {

SyncClock& clock_of(const uint64_t* counter) {
  return running_cluster->counters[reinterpret_cast<uintptr_t>(counter)];
}

}  // namespace

void counter_add_release(uint64_t* counter, uint64_t value) {
  check_access(counter, sizeof(*counter), Access::kUpdate, __builtin_return_address(0));
  release(*running, clock_of(counter));
  *counter += value;
}

// Of clusters that ended before the running one began, all is known.
uint64_t counter_load_acquire(uint64_t* counter) {
  check_access(counter, sizeof(*counter), Access::kAtomicRead, __builtin_return_address(0));
  acquire(*running, clock_of(counter));
  running_block->acquired = true;
  return *counter;
}

}  // namespace m3i::emulator
