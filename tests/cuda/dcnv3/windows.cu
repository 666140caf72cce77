// dcnv3's windows, tested by the compiler: this file is right if it compiles.
#include "dcnv3/sm80/kernels.cuh"

namespace m3i::dcnv3 {

constexpr Dcnv3Shape make_shape(int64_t batch, int64_t side, int64_t groups, int64_t group_size,
                                int64_t stride = 1) {
  Dcnv3Shape shape{};
  shape.batch = batch;
  shape.height = shape.out_height = side;
  shape.width = shape.out_width = side;
  shape.groups = groups;
  shape.group_size = group_size;
  shape.points = 9;
  shape.stride_height = shape.stride_width = stride;
  return shape;
}

constexpr Policy kTuned = kPolicies[0];

// ---- Calls that windows serve -------------------------------------------------------------------

static_assert(has_windows(make_shape(1, 14, 2, 16), 8), "a model's layer in bf16");
static_assert(has_windows(make_shape(1, 14, 2, 32), 4), "and in float32");
static_assert(!has_windows(make_shape(1, 14, 2, 16), 1), "an array that is not aligned");
static_assert(!has_windows(make_shape(1, 14, 2, 24), 8), "groups that do not fill 32 lanes");
static_assert(!has_windows(make_shape(1, 14, 2, 64), 8), "a group of more than 32 lanes");
static_assert(!has_windows(make_shape(1, 14, 2, 16, 2), 8), "a stride");

// ---- Strips -------------------------------------------------------------------------------------

constexpr WindowTiling windows_of(const Dcnv3Shape& shape) {
  return make_window_tiling(shape, kTuned);
}

static_assert(windows_of(make_shape(1, 14, 2, 16)).slices == 1, "two groups of 16");
static_assert(windows_of(make_shape(1, 14, 7, 16)).slices == 4, "the last slice has one");
static_assert(windows_of(make_shape(1, 14, 2, 16)).strips == 2, "8 and 6 columns");
static_assert(windows_of(make_shape(64, 56, 8, 16)).rows == 14, "four segments, not of 16 rows");
static_assert(windows_of(make_shape(64, 56, 8, 16)).segments == 4, "");
static_assert(windows_of(make_shape(1, 14, 2, 16)).rows == 4, "few images: short segments");

constexpr bool strips_hold() {
  for (int64_t batch = 1; batch <= 64; batch *= 8) {
    for (int64_t side = 1; side <= 60; ++side) {
      for (int64_t groups = 1; groups <= 9; ++groups) {
        const WindowTiling window = windows_of(make_shape(batch, side, groups, 16));
        if (window.rows < 1 || window.rows > kMostRows) return false;
        if (window.segments * window.rows < side) return false;
        if ((window.segments - 1) * window.rows >= side) return false;
        if (window.strips * kStripColumns < side) return false;
        if (window.slices * window.groups < groups) return false;
        const int64_t warps = window.slices * window.strips * window.segments;
        if (window.blocks * kTuned.warps < warps) return false;
        if ((window.blocks - 1) * kTuned.warps >= warps) return false;
      }
    }
  }
  return true;
}
static_assert(strips_hold(), "rows, columns, groups and blocks of all sizes");

// A warp's units are whole pixels of a slice, and pieces divide a strip.
constexpr bool pieces_hold(int vector) {
  for (int64_t group_size = vector; group_size <= 32; group_size *= 2) {
    const Dcnv3Shape shape = make_shape(1, 14, 8, group_size);
    const int units = make_tiling(shape, vector, kTuned).units;
    const int groups = windows_of(shape).groups;
    if (units % groups != 0 || kStripColumns % (units / groups) != 0) return false;
  }
  return true;
}
static_assert(pieces_hold(8) && pieces_hold(4), "half types and float32");

// ---- Shared memory ------------------------------------------------------------------------------

// The last float of a window is a cell that 16 bits hold, and is not the mark of none.
static_assert(kWindowFloats < 0xffff, "cells in half a word");
static_assert((kWindowRows & (kWindowRows - 1)) == 0, "rows modulo a power of two, also above 0");

constexpr int bytes_of(const Dcnv3Shape& shape, int vector) {
  return window_block_bytes(make_tiling(shape, vector, kTuned), kTuned.warps);
}
static_assert(3 * (bytes_of(make_shape(1, 14, 8, 16), 8) + 1024) <= 227 * 1024,
              "three blocks on a multiprocessor of 9.0");
static_assert(2 * (bytes_of(make_shape(1, 14, 8, 16), 8) + 1024) <= 164 * 1024,
              "two on one of 8.0");
static_assert(bytes_of(make_shape(1, 14, 8, 8), 8) <= kMostShared, "one on every card");

}  // namespace m3i::dcnv3
