// Conversions between float and IEEE half, rounded to nearest even. Device code only.
#pragma once

#include "m3i/types.h"

#ifdef M3I_EMULATOR
#include "emulator/numbers/numbers.h"
#endif

namespace m3i {

// Two values in one word, `low` in the lower half (lower address).
__device__ inline uint32_t pack_f16x2(float low, float high) {
#ifndef M3I_EMULATOR
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return emulator::float_to_half(low) | static_cast<uint32_t>(emulator::float_to_half(high)) << 16;
#endif
}

__device__ inline void unpack_f16x2(uint32_t packed, float& low, float& high) {
#ifndef M3I_EMULATOR
  asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
      : "=f"(low), "=f"(high)
      : "r"(packed));
#else
  low = emulator::half_to_float(static_cast<uint16_t>(packed));
  high = emulator::half_to_float(static_cast<uint16_t>(packed >> 16));
#endif
}

}  // namespace m3i
