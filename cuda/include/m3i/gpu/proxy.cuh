// Memory as threads see it, and as wgmma and tensor copies do: two views that a fence joins
// (sm_90). Device code only.
#pragma once

#include "m3i/gpu/ptx.cuh"

namespace m3i {

// What the thread has stored in shared memory is visible to wgmma and tensor copies that a barrier
// orders after this.
__device__ inline void fence_proxy_async() {
#ifdef M3I_EMULATOR
  emulator::fence_proxy_async();
#else
  M3I_ASM_90("fence.proxy.async.shared::cta;" :: : "memory");
#endif
}

// Likewise of global memory, between ordinary accesses and tensor copies: by who stored, before a
// release, and by who copies, after the acquire.
__device__ inline void fence_proxy_async_global() {
#ifdef M3I_EMULATOR
  emulator::fence_proxy_async_global();
#else
  M3I_ASM_90("fence.proxy.async.global;" :: : "memory");
#endif
}

}  // namespace m3i
