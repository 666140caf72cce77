// mask_mix: parameters, as the CPU kernel, the launcher and the device code all read them.
#pragma once

#include "m3i/types.h"

namespace m3i {

inline constexpr int kMaskMixChannels = 3;

// All arrays are contiguous, row-major; H is a multiple of h, W of w, and H * W < 2^31.
struct MaskMixParams {
  const uint8_t* views;  // [B, 3, H, W]
  const bool* mask;      // [P, h, w] true: the first of the pair's views, false: the second
  const int64_t* pairs;  // [P, 2] rows of views
  void* out;             // [P, 3, H, W] of out_dtype
  DType out_dtype;
  int64_t num_views;    // B
  int64_t num_pairs;    // P
  int64_t height;       // H, pixels
  int64_t width;        // W, pixels
  int64_t grid_height;  // h, cells
  int64_t grid_width;   // w, cells
  // out = fma(pixel, scale, shift), a channel
  float scale[kMaskMixChannels];
  float shift[kMaskMixChannels];
};

}  // namespace m3i
