// views: what the kernel is launched with.
#pragma once

#include "views/params.h"

namespace m3i {

// Views of a sample, at most: their targets travel as parameters of the kernel, of which there are
// 4 KiB.
inline constexpr int kViewsMostOnCuda = 128;

// Scratch memory is given out in pages.
inline constexpr int64_t kViewsPage = 4096;
inline constexpr uint32_t kViewsNoScratch = 0xffffffffu;

// Where one view of every sample goes: squares of S pixels, or grids of patches of P, T in all.
struct ViewTarget {
  uint8_t* out;  // [B, 3, S, S] or [T, 3, P, P]
  int32_t size;  // S or T
  int16_t blur_kernel_size;
  int16_t cubic;
  uint32_t scratch_page;  // first page of as many bytes as `out` has, or kViewsNoScratch
};

// All arrays are on the device. Pictures are given in one of two ways: each by itself, as DALI's
// lists have them, or as tensors.
struct ViewsCudaParams {
  const ViewImage* images;    // [B, M], or null: the next three count
  const uint8_t* pixels;      // [num_bytes]
  const int64_t* offset;      // [B, M] of a picture's [height, width, 3] in pixels
  const int64_t* image_size;  // [B, M, 2] height and width
  int64_t num_bytes;
  const ViewParams* params;  // [B, V]
  const ViewGrid* grids;     // [B, V] of patches; null where views are squares
  uint8_t* scratch;          // as many bytes as the plan said, or null for none
  int32_t num_samples;       // B
  int32_t num_pictures;      // M, 1 or 2: see view_source
  int32_t num_views;         // V, up to kViewsMostOnCuda
  int32_t patch_size;        // P
  int32_t shared_bytes;      // of a block
  ViewTarget targets[kViewsMostOnCuda];
};
static_assert(sizeof(ViewsCudaParams) <= 4096, "what a kernel's parameters may take");

}  // namespace m3i
