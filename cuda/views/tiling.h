// views: how a block cuts a view's work into pieces that fit its shared memory. A function of sizes
// alone, so that every thread of the block finds the same, and a compiler tests it
// (tests/cuda/views/policy.cu).
#pragma once

#include "m3i/types.h"

namespace m3i::views {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kMinBlocks = 4;  // on a multiprocessor: 64 registers a thread

// Dynamic shared memory of a block: with registers for four of them, so that a multiprocessor of an
// A100 (164 KiB, of which the system and alignment take 2 KiB a block) has four as well. Only the
// blur of views of more than 250 pixels takes more.
inline constexpr int kSharedBytes = 38 * 1024;
inline constexpr int kMostSharedBytes = 64 * 1024;

// ---- Resize -------------------------------------------------------------------------------------

struct ResizeTiling {
  int32_t columns;  // of the view, resized together; 0: not even one fits
  int32_t panel;    // rows of the view whose weights are held together
  int32_t rows;     // of the crop, loaded together, at most one a warp
  int32_t segment;  // bytes of a row of the crop in shared memory
  int32_t ring;     // rows of the crop that are held once resized across
};

// Bytes of a row's pixels that `columns` neighbours of the view need, in whole pieces of 16 with
// room for what precedes the first and follows the last.
M3I_HOST_DEVICE constexpr int64_t segment_bytes(int columns, int size, int width, int taps) {
  const int64_t apart = (static_cast<int64_t>(columns - 1) * width + size - 1) / size + 1;
  const int64_t pixels = apart + taps < width ? apart + taps : width;
  return (3 * pixels + 2 * 15) / 16 * 16;
}

// Bytes of the weights of so many rows or columns: first tap, number of taps, and each weight.
M3I_HOST_DEVICE constexpr int64_t weight_bytes(int outputs, int taps) {
  const int64_t bytes = static_cast<int64_t>(outputs) * (8 + 2 * static_cast<int64_t>(taps));
  return (bytes + 15) / 16 * 16;
}

M3I_HOST_DEVICE constexpr int64_t resize_bytes(const ResizeTiling& tiling, int taps_across,
                                               int taps_down) {
  return weight_bytes(tiling.columns, taps_across) + weight_bytes(tiling.panel, taps_down) +
         static_cast<int64_t>(tiling.rows) * tiling.segment +
         static_cast<int64_t>(tiling.ring) * 3 * tiling.columns;
}

// All columns where they fit with the weights of fewer rows of the view, or fewer rows of the crop
// at once; else half of them, and so on. Fewer than four rows, which leave warps without work, only
// once columns are no more than a warp's lanes. width: of the crop. `taps`: the most that a column
// or a row has.
M3I_HOST_DEVICE constexpr ResizeTiling resize_tiling(int view_height, int view_width, int width,
                                                     int taps_across, int taps_down) {
  for (int columns = view_width;; columns = (columns + 1) / 2) {
    const int64_t segment = segment_bytes(columns, view_width, width, taps_across);
    const int fewest = columns > 32 ? kWarps / 2 : 1;
    for (int rows = kWarps; segment <= kSharedBytes && rows >= fewest; rows /= 2) {
      for (int panel = view_height;; panel = (panel + 1) / 2) {
        const ResizeTiling tiling{columns, panel, rows, static_cast<int32_t>(segment),
                                  taps_down + rows};
        if (resize_bytes(tiling, taps_across, taps_down) <= kSharedBytes) return tiling;
        if (panel == 1) break;
      }
    }
    if (columns == 1) return {};
  }
}

// ---- Blur ---------------------------------------------------------------------------------------

// Neighbours that a thread sums together, each value loaded once for all of them. Odd, so that
// lanes whose runs are neighbours along a row meet no bank of shared memory twice.
inline constexpr int kRun = 7;

struct BlurTiling {
  int32_t columns;  // of the view, blurred together, a multiple of kRun
  int32_t planes;   // channels together, 3 or 1; 0: nothing fits
};

M3I_HOST_DEVICE constexpr int whole_runs(int count) { return (count + kRun - 1) / kRun * kRun; }

// Of weights up to the centre's `half`th neighbour, in double and in float.
M3I_HOST_DEVICE constexpr int64_t blur_weight_bytes(int half) {
  return (static_cast<int64_t>(half + 1) * 12 + 15) / 16 * 16;
}

// kRun rows of pixels with those that blur them at both ends, and the ring of rows blurred across:
// what a run of rows needs. All in float.
M3I_HOST_DEVICE constexpr int64_t blur_bytes(int columns, int planes, int half, int radius) {
  const int64_t row = columns + 2 * radius;
  return blur_weight_bytes(half) +
         4 * planes * (kRun * row + (2 * radius + kRun) * static_cast<int64_t>(columns));
}

M3I_HOST_DEVICE constexpr BlurTiling blur_tiling(int width, int half, int radius, int64_t bytes) {
  for (int columns = whole_runs(width);; columns = whole_runs(columns / 2)) {
    if (blur_bytes(columns, 3, half, radius) <= bytes) return {columns, 3};
    if (blur_bytes(columns, 1, half, radius) <= bytes) return {columns, 1};
    if (columns == kRun) return {};
  }
}

// Whether a view is blurred where it stands: its rows are written over once the ring has them,
// which takes all columns at once. Else it is blurred out of scratch memory.
M3I_HOST_DEVICE constexpr bool blurs_in_place(int size, int half) {
  return blur_bytes(whole_runs(size), 1, half, half) <= kMostSharedBytes;
}

// Shared memory of the blocks of a launch that has such views.
M3I_HOST_DEVICE constexpr int64_t shared_bytes(int size, int half) {
  const int64_t needed = blur_bytes(whole_runs(size), 1, half, half);
  return needed <= kSharedBytes       ? kSharedBytes
         : needed <= kMostSharedBytes ? needed
                                      : kMostSharedBytes;
}

// Of a launch that blurs views out of scratch memory, of any sizes: a run of columns has to fit.
M3I_HOST_DEVICE constexpr int64_t shared_bytes_of_runs(int half) {
  const int64_t needed = blur_bytes(kRun, 1, half, half);
  return needed <= kSharedBytes ? kSharedBytes : needed;
}

}  // namespace m3i::views
