// Products of a warpgroup, for the wrappers in m3i/gpu/wgmma.cuh.
#pragma once

#include "emulator/instructions/tile.h"

namespace m3i::emulator {

// D[64, columns] (+)= A[64, 16] B[16, columns]; A by its descriptor, or in the registers of the
// threads where a_words is not null.
struct WarpgroupProduct {
  Product kind;
  uint32_t columns;
  bool accumulate;
  bool a_is_m_major;
  bool b_is_n_major;
  uint64_t a;
  uint64_t b;
  const uint32_t* a_words;
};

// The registers `d` hold NaN from here until wgmma_wait writes the sum.
M3I_EMULATOR_API void wgmma(float* d, const WarpgroupProduct& product);
M3I_EMULATOR_API void wgmma_fence();
M3I_EMULATOR_API void wgmma_commit();
M3I_EMULATOR_API void wgmma_wait(int groups);

// Makes the running thread's writes visible to wgmma and tensor copies that a barrier orders after
// this.
M3I_EMULATOR_API void fence_proxy_async();
// Likewise those to global memory; and makes visible to its own tensor copies what it has heard of.
M3I_EMULATOR_API void fence_proxy_async_global();

// The hardware's address of a byte of dynamic shared memory, counted from its first byte.
M3I_EMULATOR_API uint32_t shared_offset(const void* shared);

}  // namespace m3i::emulator
