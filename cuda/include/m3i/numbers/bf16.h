// Conversion of float to bfloat16, rounded to nearest even: by the hardware on a GPU, and with the
// same bits by integer arithmetic on a host.
#pragma once

#include "m3i/types.h"

#ifndef __CUDACC_RTC__
#include <cstring>
#endif

namespace m3i {

// NaN gives a quiet NaN; all other values round to nearest even, with overflow to infinity.
M3I_HOST_DEVICE inline uint16_t bf16_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#ifdef __CUDACC__

// Two values in one word, `low` in the lower half (lower address). sm_80 and later.
__device__ inline uint32_t pack_bf16x2(float low, float high) {
#ifndef M3I_EMULATOR
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
#endif
}

#endif  // __CUDACC__

}  // namespace m3i
