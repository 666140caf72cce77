// dcnv3: tiles. Made of tiles.json, which says why, by m3i_fast/ops/tiles.py.
#pragma once

#include "dcnv3/policy.h"
#include "m3i/types.h"

namespace m3i::dcnv3 {

// Below compute capability 9.0 and from there on, images of few and of many pixels.
inline constexpr Policy kPolicies[] = {
    {4, 6, 5, 288, 64},  // a100, small
    {4, 6, 5, 288, 64},  // a100, large
    {4, 6, 5, 288, 64},  // h100, small
    {4, 6, 5, 288, 64},  // h100, large
};
inline constexpr int64_t kSmallPixels = 400;

inline constexpr int64_t kCpuBlockPoints = 256;

}  // namespace m3i::dcnv3
