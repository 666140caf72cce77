// Barriers of some of a block's warps. Device code only.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Waits until `threads` threads, a multiple of 32, have come to barrier `id`, 1 to 15 (0 is
// __syncthreads). Every lane of a warp comes.
__device__ inline void named_barrier_sync(int id, int threads) {
#ifdef M3I_EMULATOR
  emulator::named_barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts as having come, without waiting.
__device__ inline void named_barrier_arrive(int id, int threads) {
#ifdef M3I_EMULATOR
  emulator::named_barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace m3i
