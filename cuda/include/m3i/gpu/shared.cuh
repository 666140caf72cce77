// The block's dynamic shared memory, and the one way to it. Device code only.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Its first byte, aligned for the widest swizzle of a tensor copy. A declaration that a host can
// run as well cannot be `extern __shared__`, so kernels carve what they need out of this.
template <class T = unsigned char>
__device__ inline T* dynamic_shared() {
#ifdef M3I_EMULATOR
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

}  // namespace m3i
