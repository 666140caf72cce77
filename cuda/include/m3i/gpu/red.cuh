// Additions to global memory whose former value nobody asks for. Device code only.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Floats that one instruction adds: what neighbouring lanes should have each, so that a warp's
// instruction covers whole sectors.
#if __CUDA_ARCH__ >= 900
inline constexpr int kRedFloats = 4;
#else
inline constexpr int kRedFloats = 1;
#endif

// to[i] += values[i], each component by itself; `to` is aligned to all of it. One instruction on
// sm_90, kSize of them before.
template <int kSize>
__device__ inline void red_add(float* to, const float (&values)[kSize]) {
  static_assert(kSize == 1 || kSize == 2 || kSize == 4, "the sizes that the hardware adds");
#if defined(M3I_EMULATOR)
  constexpr int kOnce = kSize < kRedFloats ? kSize : kRedFloats;
  for (int i = 0; i < kSize; i += kOnce) emulator::red_add(to + i, values + i, kOnce);
#elif __CUDA_ARCH__ >= 900
  if constexpr (kSize == 1) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(values[0]) : "memory");
  } else if constexpr (kSize == 2) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(values[0]), "f"(values[1])
                 : "memory");
  } else {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values[0]),
                 "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
  }
#else
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to + i), "f"(values[i]) : "memory");
  }
#endif
}

// In double, one instruction each.
template <int kSize>
__device__ inline void red_add(double* to, const double (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) atomicAdd(to + i, values[i]);
}

}  // namespace m3i
