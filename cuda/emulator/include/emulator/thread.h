// A thread's indices in its block and grid, and the barriers of its block.
#pragma once

#include "emulator/numbers/vector_types.h"
#include "emulator/runtime.h"

// Constant for the thread that reads them, so that accesses are not checked, and the compiler may
// keep values in registers. (Not dim3, whose constructors prevent that.)
extern "C" {
M3I_EMULATOR_API extern const uint3 threadIdx;
M3I_EMULATOR_API extern const uint3 blockIdx;
M3I_EMULATOR_API extern const uint3 blockDim;
M3I_EMULATOR_API extern const uint3 gridDim;
}
inline constexpr int warpSize = 32;

// Every thread of the block has to arrive, at the same line.
inline void __syncthreads(M3I_EMULATOR_SITE) {
  m3i::emulator::block_barrier(m3i::emulator::Vote::kNone, false, site);
}
inline int __syncthreads_count(int predicate, M3I_EMULATOR_SITE) {
  return m3i::emulator::block_barrier(m3i::emulator::Vote::kCount, predicate, site);
}
inline int __syncthreads_and(int predicate, M3I_EMULATOR_SITE) {
  return m3i::emulator::block_barrier(m3i::emulator::Vote::kAnd, predicate, site);
}
inline int __syncthreads_or(int predicate, M3I_EMULATOR_SITE) {
  return m3i::emulator::block_barrier(m3i::emulator::Vote::kOr, predicate, site);
}

inline void __threadfence_block() { m3i::emulator::thread_fence(); }
inline void __threadfence() { m3i::emulator::thread_fence(); }
inline void __threadfence_system() { m3i::emulator::thread_fence(); }

// Yields to the other threads of the block.
inline void __nanosleep(unsigned, M3I_EMULATOR_SITE) { m3i::emulator::yield(site); }

[[noreturn]] inline void __trap(M3I_EMULATOR_SITE) { m3i::emulator::fail("__trap()", site); }
