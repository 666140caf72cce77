// Half precision, with the interface of CUDA's header of this name. Arithmetic is done in float and
// rounded once, as on the hardware.
#pragma once

#include "emulator/numbers/half.h"

using __half = m3i::emulator::Small<m3i::emulator::HalfFormat>;
using __half2 = m3i::emulator::SmallPair<__half>;
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __double2half(double x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
