// Barriers in shared memory, which count arrivals of threads and bytes of asynchronous copies
// (sm_90). Device code only.
//
// A phase is complete when as many arrivals as the barrier was made for have come, and as many
// bytes as were expected; then the next one begins. The first phase has parity 0, the next one 1,
// then 0.
//
//   if (threadIdx.x == 0) {
//     mbarrier_init(&full, 1);
//     mbarrier_init_fence();
//   }
//   __syncthreads();
//   mbarrier_arrive(&full);           what the thread did before ...
//   mbarrier_wait(&full, parity);     ... is seen by those who have waited for the phase
#pragma once

#include "m3i/gpu/ptx.cuh"

namespace m3i {

// In shared memory, touched by the functions here only.
using Mbarrier = uint64_t;

// For `count` arrivals a phase. By one thread; the others wait at a block or cluster barrier.
__device__ inline void mbarrier_init(Mbarrier* barrier, uint32_t count) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_init(barrier, count);
#else
  M3I_ASM_90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
             "r"(count) : "memory");
#endif
}

// After its mbarrier_init and before the block or cluster barrier, where copies or other blocks
// arrive too.
__device__ inline void mbarrier_init_fence() {
#ifdef M3I_EMULATOR
  emulator::mbarrier_init_fence();
#else
  M3I_ASM_90("fence.mbarrier_init.release.cluster;" :: : "memory");
#endif
}

__device__ inline void mbarrier_arrive(Mbarrier* barrier) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_arrive(barrier);
#else
  M3I_ASM_90("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
      shared_address(barrier)) : "memory");
#endif
}

// Arrives, and has the phase wait for `bytes` more.
__device__ inline void mbarrier_arrive_expect_tx(Mbarrier* barrier, uint32_t bytes) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_arrive_expect_tx(barrier, bytes);
#else
  M3I_ASM_90(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          shared_address(barrier)),
      "r"(bytes) : "memory");
#endif
}

// Has the phase wait for `bytes` more, without arriving.
__device__ inline void mbarrier_expect_tx(Mbarrier* barrier, uint32_t bytes) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_expect_tx(barrier, bytes);
#else
  M3I_ASM_90(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes) : "memory");
#endif
}

// As if a copy of so many bytes had landed. Orders nothing.
__device__ inline void mbarrier_complete_tx(Mbarrier* barrier, uint32_t bytes) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_complete_tx(barrier, bytes);
#else
  M3I_ASM_90(
      "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes) : "memory");
#endif
}

// Whether the phase of this parity, the current one or the one before it, is complete. May wait for
// it a while.
__device__ inline bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity) {
#ifdef M3I_EMULATOR
  return emulator::mbarrier_try_wait(barrier, parity);
#else
  uint32_t complete = 0;
  M3I_ASM_90(
      "{\n.reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n}" : "=r"(complete) : "r"(shared_address(barrier)),
      "r"(parity) : "memory");
  return complete != 0;
#endif
}

// Until the phase of this parity is complete. Who fills a slot that was never used waits for
// parity 1.
__device__ inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
#ifdef M3I_EMULATOR
  emulator::mbarrier_wait(barrier, parity);
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace m3i
