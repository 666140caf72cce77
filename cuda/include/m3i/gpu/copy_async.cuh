// Copies from global to shared memory that go on while the thread does (sm_80). Device code only.
//
//   copy_async<16>(to, from); ...   copies of this thread
//   copy_async_commit();            make them a group
//   copy_async_wait<1>();           until at most one group is under way
//   __syncthreads();                until those of the other threads are there too
#pragma once

#include "m3i/types.h"

namespace m3i {

// kBytes (4, 8 or 16) from global to shared memory, both aligned to kBytes; zeros where `inside` is
// false, and `from` is not read.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, bool inside = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "the sizes that the hardware copies");
#ifdef M3I_EMULATOR
  emulator::copy_async(to, from, kBytes, inside);
#else
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int read_bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(read_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                 "n"(kBytes), "r"(read_bytes)
                 : "memory");
  }
#endif
}

__device__ inline void copy_async_commit() {
#ifdef M3I_EMULATOR
  emulator::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kGroups>
__device__ inline void copy_async_wait() {
#ifdef M3I_EMULATOR
  emulator::copy_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace m3i
