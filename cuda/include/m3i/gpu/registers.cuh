// Registers. Device code only.
//
// One warpgroup gives up some and another one takes them (sm_90a):
// A block starts with as many registers a thread as its launch bound leaves: 168 where it is
// __launch_bounds__(384, 1). (Without the 1 ptxas ignores all of this.) A warpgroup that only
// issues copies goes down to 24, and two that multiply go up to 240; who goes up waits until enough
// were given up.
#pragma once

#include "m3i/gpu/ptx.cuh"

namespace m3i {

// All four warps of a warpgroup come to it.
template <int kCount>
__device__ inline void setmaxnreg_inc() {
  static_assert(24 <= kCount && kCount <= 256 && kCount % 8 == 0,
                "the counts that the hardware has");
#ifdef M3I_EMULATOR
  emulator::set_max_registers(kCount, true);
#else
  M3I_ASM_90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ inline void setmaxnreg_dec() {
  static_assert(24 <= kCount && kCount <= 256 && kCount % 8 == 0,
                "the counts that the hardware has");
#ifdef M3I_EMULATOR
  emulator::set_max_registers(kCount, false);
#else
  M3I_ASM_90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// The value, which the compiler does not compute again later.
__device__ inline int in_register(int value) {
#ifndef M3I_EMULATOR
  asm volatile("" : "+r"(value));
#endif
  return value;
}

}  // namespace m3i
