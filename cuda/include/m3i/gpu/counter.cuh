// Counters in global memory, by which threads of any blocks of a launch wait for what others did.
// Device code only.
#pragma once

#include "m3i/gpu/ptx.cuh"

namespace m3i {

// What the thread did before, and what it knows others of its block did, is seen by who waits.
__device__ inline void counter_add_release(uint64_t* counter, uint64_t value) {
#ifdef M3I_EMULATOR
  emulator::counter_add_release(counter, value);
#else
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
#endif
}

__device__ inline uint64_t counter_load_acquire(uint64_t* counter) {
#ifdef M3I_EMULATOR
  return emulator::counter_load_acquire(counter);
#else
  uint64_t value = 0;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
#endif
}

// Until the counter is at least `value`. By one thread; the others of its warp wait for it there.
__device__ inline void counter_wait(uint64_t* counter, uint64_t value) {
  while (counter_load_acquire(counter) < value) __nanosleep(64);
}

}  // namespace m3i
