// bfloat16, with the interface of CUDA's header of this name. Arithmetic is done in float and
// rounded once, as on the hardware.
#pragma once

#include "emulator/numbers/half.h"

using __nv_bfloat16 = m3i::emulator::Small<m3i::emulator::BFloat16Format>;
using __nv_bfloat162 = m3i::emulator::SmallPair<__nv_bfloat16>;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
