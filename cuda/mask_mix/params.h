// mask_mix: parameters of the CPU kernel, the launcher and the device code.
#pragma once

#include "m3i/types.h"

namespace m3i {

inline constexpr int kMaskMixChannels = 3;

// Most views of one picture, since choice has a byte a cell.
inline constexpr int kMaskMixMaxMembers = 255;

// All arrays are contiguous, row-major; H is a multiple of h, W of w, and H * W < 2^31.
struct MaskMixParams {
  const uint8_t* views;    // [B, 3, H, W]
  const uint8_t* choice;   // [P, h, w] columns of members
  const int64_t* members;  // [P, K] rows of views
  void* out;               // [P, 3, H, W] of out_dtype
  DType out_dtype;
  int64_t num_views;     // B
  int64_t num_pictures;  // P
  int64_t num_members;   // K, 1 to 255
  int64_t height;        // H, pixels
  int64_t width;         // W, pixels
  int64_t grid_height;   // h, cells
  int64_t grid_width;    // w, cells
  // out = fma(pixel, scale, shift), a channel
  float scale[kMaskMixChannels];
  float shift[kMaskMixChannels];
};

}  // namespace m3i
