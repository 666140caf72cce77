// dcnv3 on CUDA: the division of a call into blocks and warps, and array offsets; pure functions.
//
// A unit is one output pixel in one group, counted through [Ho, Wo, G] of an image. The lanes of a
// unit divide its channels; a warp has 32 / lanes units, neighbours in memory. All units of a block
// are of one image.
#pragma once

#include "dcnv3/params.h"
#include "dcnv3/tiles.h"

namespace m3i::dcnv3 {

inline constexpr int kWarpLanes = 32;
inline constexpr int kLinearThreads = 128;  // of elementwise kernels

// float64 serves tests and small problems, and is not tuned.
inline constexpr Policy kFloat64Policy{4, 6, 5, 288, 64};

M3I_HOST_DEVICE constexpr int threads_of(const Policy& policy) { return policy.warps * kWarpLanes; }

// Conditions: a thread for each point of a chunk, a slot for each unit, and at most 2048 threads of
// the blocks on a multiprocessor.
M3I_HOST_DEVICE constexpr bool is_legal(const Policy& policy) {
  const int threads = threads_of(policy);
  const int most = policy.blocks > policy.bwd_blocks ? policy.blocks : policy.bwd_blocks;
  return threads >= kWarpLanes && policy.chunk >= 1 && policy.chunk <= threads &&
         policy.slots >= kWarpLanes && policy.blocks >= 1 && policy.bwd_blocks >= 1 &&
         threads * most <= 2048;
}

inline constexpr int kNumPolicies = sizeof(kPolicies) / sizeof(kPolicies[0]);

M3I_HOST_DEVICE constexpr bool are_legal() {
  for (const Policy& policy : kPolicies) {
    if (!is_legal(policy)) return false;
  }
  return true;
}
static_assert(are_legal(), "cuda/dcnv3/tiles.json: threads, slots or chunks that no kernel takes");

// The index into kPolicies, by the card and the size of an image's output.
M3I_HOST_DEVICE constexpr int policy_index(int architecture, const Dcnv3Shape& shape) {
  return (architecture >= 90 ? 2 : 0) + (shape.out_height * shape.out_width < kSmallPixels ? 0 : 1);
}

struct Tiling {
  int64_t blocks;  // of an image
  int lanes;       // of a unit, a power of two
  int units;       // of a warp
  int chunk;       // points of a unit at once
  int pitch;       // slots from unit to unit: odd, so that the units' slots are in different banks
};

// Elements of one access: those of 16 bytes where the arrays are aligned to them. `addresses`: the
// bitwise or of the arrays' addresses.
M3I_HOST_DEVICE constexpr int vector_size(int64_t group_size, int widest, uint64_t addresses) {
  return group_size % widest == 0 && addresses % 16 == 0 ? widest : 1;
}

M3I_HOST_DEVICE constexpr int64_t units_per_image(const Dcnv3Shape& shape) {
  return shape.out_height * shape.out_width * shape.groups;
}

M3I_HOST_DEVICE constexpr Tiling make_tiling(const Dcnv3Shape& shape, int vector,
                                             const Policy& policy) {
  const int64_t points = shape.points;
  Tiling tiling{0, 1, 0, 0, 0};
  while (tiling.lanes < kWarpLanes && int64_t{tiling.lanes} * vector < shape.group_size) {
    tiling.lanes *= 2;
  }
  tiling.units = kWarpLanes / tiling.lanes;
  const int slots = policy.slots / tiling.units;
  const int odd = slots % 2 ? slots : slots - 1;
  const int64_t most = odd < policy.chunk ? odd : policy.chunk;
  const int64_t num_chunks = (points + most - 1) / most;
  tiling.chunk = static_cast<int>((points + num_chunks - 1) / num_chunks);
  tiling.pitch = tiling.chunk | 1;
  const int64_t units = int64_t{policy.warps} * tiling.units;
  tiling.blocks = (units_per_image(shape) + units - 1) / units;
  return tiling;
}

// ---- The backward's windows ---------------------------------------------------------------------
// The gradient by x of 32 neighbouring channels is summed in a window of pixels in shared memory,
// a warp's own, with a lane a channel: neither atomics nor bank conflicts. The window follows the
// warp down a strip of output pixels; a row that it leaves is added to global memory, once. A point
// outside of it is added there by itself.

inline constexpr int kStripColumns = 8;  // output pixels across
inline constexpr int kHaloColumns = 2;   // on either side: a 3 x 3 kernel, and offsets of a pixel
inline constexpr int kHaloRows = 3;      // above; below one more, for lower corners
inline constexpr int kWindowColumns = kStripColumns + 2 * kHaloColumns;
inline constexpr int kWindowRows = 2 * kHaloRows + 2;  // a power of two: row y is at y mod 8
inline constexpr int kWindowFloats = kWindowRows * kWindowColumns * kWarpLanes;

// Bytes of shared memory that a block may have on every card of compute capability 8.0 and later.
inline constexpr int kMostShared = 99 * 1024;

// A warp's work is a strip of `rows` output rows in 32 channels, which are of whole groups.
struct WindowTiling {
  int64_t blocks;    // of an image
  int64_t slices;    // of 32 channels; the last one may be less
  int64_t strips;    // across the output
  int64_t segments;  // down the output
  int rows;          // of a segment
  int groups;        // of a slice
};

// Whether windows serve a call with accesses of `vector` elements: groups fill 32 lanes, and
// neighbouring output pixels sample around neighbouring pixels.
M3I_HOST_DEVICE constexpr bool has_windows(const Dcnv3Shape& shape, int vector) {
  return vector > 1 && kWarpLanes % shape.group_size == 0 && shape.stride_height == 1 &&
         shape.stride_width == 1;
}

// Strips are cut while that gives a GPU more warps to work on: rows that two segments share are
// added twice.
inline constexpr int64_t kWindowWarps = 2048;
inline constexpr int kMostRows = 16, kLeastRows = 4;

M3I_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

M3I_HOST_DEVICE constexpr WindowTiling make_window_tiling(const Dcnv3Shape& shape,
                                                          const Policy& policy) {
  WindowTiling window{};
  window.groups = static_cast<int>(kWarpLanes / shape.group_size);
  window.slices = divide_up(shape.groups, window.groups);
  window.strips = divide_up(shape.out_width, kStripColumns);
  int64_t rows = kMostRows;
  const int64_t across = shape.batch * window.slices * window.strips;
  while (rows > kLeastRows && across * divide_up(shape.out_height, rows) < kWindowWarps) rows /= 2;
  window.segments = divide_up(shape.out_height, rows);
  window.rows = static_cast<int>(divide_up(shape.out_height, window.segments));
  window.blocks = divide_up(window.slices * window.strips * window.segments, policy.warps);
  return window;
}

// ---- The forward of nine points -----------------------------------------------------------------

inline constexpr int kNinePoints = 9;

// Division of 0 to 2^31 - 1 by one number, in three instructions.
struct Divisor {
  uint32_t multiplier, shift;

  M3I_HOST_DEVICE static constexpr Divisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << shift;
    return {static_cast<uint32_t>(((power - divisor) << 32) / divisor + 1), shift};
  }
#ifdef __CUDACC__
  __device__ int divide(int value) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(value), multiplier) + value) >> shift);
  }
#endif
};

// Whether that kernel serves a call with accesses of `vector` elements: 32 bits hold every offset
// within an image, places without an offset are pixels, and offsets are scaled without a rounding.
// `addresses`: the bitwise or of all arrays' addresses.
M3I_HOST_DEVICE constexpr bool is_nine(const Dcnv3Shape& shape, int vector, uint64_t addresses) {
  constexpr int64_t kElements = int64_t{1} << 31, kExtent = 1 << 19, kDilation = 64, kScale = 16;
  const int64_t channels = shape.groups * shape.group_size;
  const bool is_small = shape.height < kExtent && shape.width < kExtent &&
                        shape.pad_height < kExtent && shape.pad_width < kExtent &&
                        shape.dilation_height <= kDilation && shape.dilation_width <= kDilation &&
                        shape.batch < kElements / 2;
  bool is_power = false;
  for (int64_t scale = 1; scale <= kScale; scale *= 2) {
    is_power = is_power || shape.offset_scale == static_cast<double>(scale);
  }
  return vector > 1 && addresses % 16 == 0 && shape.points == kNinePoints &&
         (shape.group_size == 16 || shape.group_size == 32) && is_small && is_power &&
         shape.height * shape.width > 0 && shape.height * shape.width < kElements / channels &&
         shape.out_height * shape.out_width < kElements / channels / 2;
}

// ---- Places in memory, in elements --------------------------------------------------------------
// Products of extents may exceed 2^31 across images and within one. 32 bits hold a pixel of an
// image, (H + 3) (W + 2) < 2^31, and a point within a warp.

// Offset of a pixel's channels in one group of x or its gradient.
M3I_HOST_DEVICE constexpr int64_t group_begin(const Dcnv3Shape& shape, int64_t image,
                                              int64_t group) {
  return (image * shape.height * shape.width * shape.groups + group) * shape.group_size;
}

// Distance from there to the same group of another pixel.
M3I_HOST_DEVICE constexpr int64_t pixel_step(const Dcnv3Shape& shape, int32_t pixel) {
  return pixel * shape.groups * shape.group_size;
}

// Offset of a unit's first channel in the output or its gradient.
M3I_HOST_DEVICE constexpr int64_t out_begin(const Dcnv3Shape& shape, int64_t image, int64_t unit) {
  return (image * units_per_image(shape) + unit) * shape.group_size;
}

// Offset of a unit's first point in mask; twice that in offset.
M3I_HOST_DEVICE constexpr int64_t points_begin(const Dcnv3Shape& shape, int64_t image,
                                               int64_t unit) {
  return (image * units_per_image(shape) + unit) * shape.points;
}

}  // namespace m3i::dcnv3
