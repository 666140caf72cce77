// Fast functions of one number, and those whose name depends on its type. Device code only.
#pragma once

#include "m3i/types.h"

namespace m3i {

// a * b + c, rounded once.
__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// The same, rounded downwards.
__device__ inline float fused_down(float a, float b, float c) { return __fmaf_rd(a, b, c); }

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// 2^x within 2 units in the last place, in one instruction; 0 below the normal numbers.
__device__ inline float fast_exp2(float x) {
#ifdef M3I_EMULATOR
  const float power = exp2f(x);
  return power < 1.17549435e-38f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}
// Exact: float64 has no fast one.
__device__ inline double fast_exp2(double x) { return exp2(x); }

// 1 / x within 1 unit in the last place.
__device__ inline float fast_reciprocal(float x) {
#ifdef M3I_EMULATOR
  return 1.0f / x;
#else
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
#endif
}
__device__ inline double fast_reciprocal(double x) { return 1.0 / x; }

}  // namespace m3i
