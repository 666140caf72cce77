// dcnv3 on CUDA: how a call is cut into blocks and warps, and where its arrays lie; pure functions.
//
// A unit is one output pixel in one group, counted through [Ho, Wo, G] of an image. The lanes of a
// unit share out its channels; a warp has 32 / lanes units, neighbours in memory. Blocks never have
// units of two images.
#pragma once

#include "dcnv3/dcnv3_params.h"

namespace m3i::dcnv3 {

inline constexpr int kWarpLanes = 32;
inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * kWarpLanes;

// Blocks on a multiprocessor at least: what leaves the compiler the registers that it needs. Told
// nothing, it spills a few to fit one block more.
inline constexpr int kBlocks = 6, kBwdBlocks = 5;

// Points that a warp holds in shared memory: 32 units of a 3 x 3 kernel fit.
inline constexpr int kMaxSlots = 288;

// Points of a unit that a warp holds at once.
inline constexpr int kMaxChunk = 64;

struct Tiling {
  int64_t blocks;  // that an image is cut into
  int lanes;       // of a unit, a power of two
  int units;       // of a warp
  int chunk;       // points of a unit at once
  int pitch;  // slots from unit to unit: odd, so that the units' 16-byte slots lie in other banks
};

// Elements in one access: a full access where the arrays allow it. `addresses`: all of theirs,
// combined by `or`.
M3I_HOST_DEVICE constexpr int vector_size(int64_t group_size, int widest, uint64_t addresses) {
  return group_size % widest == 0 && addresses % 16 == 0 ? widest : 1;
}

M3I_HOST_DEVICE constexpr int64_t units_per_image(const Dcnv3Shape& shape) {
  return shape.out_height * shape.out_width * shape.groups;
}

M3I_HOST_DEVICE constexpr Tiling make_tiling(const Dcnv3Shape& shape, int vector) {
  const int64_t points = shape.points;
  Tiling tiling{0, 1, 0, 0, 0};
  while (tiling.lanes < kWarpLanes && int64_t{tiling.lanes} * vector < shape.group_size) {
    tiling.lanes *= 2;
  }
  tiling.units = kWarpLanes / tiling.lanes;
  const int slots = kMaxSlots / tiling.units;
  const int odd = slots % 2 ? slots : slots - 1;
  const int64_t most = odd < kMaxChunk ? odd : kMaxChunk;
  const int64_t num_chunks = (points + most - 1) / most;
  tiling.chunk = static_cast<int>((points + num_chunks - 1) / num_chunks);
  tiling.pitch = tiling.chunk | 1;
  const int64_t units = int64_t{kWarps} * tiling.units;
  tiling.blocks = (units_per_image(shape) + units - 1) / units;
  return tiling;
}

// ---- Places in memory, in elements --------------------------------------------------------------
// A product of extents may pass 2^31 between images and inside one. What is 32 bits wide: a pixel
// of an image, (H + 3) (W + 2) < 2^31, and a point within a warp.

// Of a pixel's channels in one group of x or its gradient.
M3I_HOST_DEVICE constexpr int64_t group_begin(const Dcnv3Shape& shape, int64_t image,
                                              int64_t group) {
  return (image * shape.height * shape.width * shape.groups + group) * shape.group_size;
}

// From there to the same group of another pixel.
M3I_HOST_DEVICE constexpr int64_t pixel_step(const Dcnv3Shape& shape, int32_t pixel) {
  return pixel * shape.groups * shape.group_size;
}

// Of a unit's first channel in the output or its gradient.
M3I_HOST_DEVICE constexpr int64_t out_begin(const Dcnv3Shape& shape, int64_t image, int64_t unit) {
  return (image * units_per_image(shape) + unit) * shape.group_size;
}

// Of a unit's first point in mask; twice that in offset.
M3I_HOST_DEVICE constexpr int64_t points_begin(const Dcnv3Shape& shape, int64_t image,
                                               int64_t unit) {
  return (image * units_per_image(shape) + unit) * shape.points;
}

}  // namespace m3i::dcnv3
