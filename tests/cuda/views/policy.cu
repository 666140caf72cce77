// views' tiling, tested by the compiler: this file is right if it compiles.
#include "views/launch_params.h"
#include "views/tiling.h"

#include <initializer_list>

namespace m3i::views {

// Most taps of a filter whose support is `half` input pixels, as resize_axis of arithmetic.h has
// it.
constexpr int taps_of(int input, int output, int half) {
  const int support = input > output ? (half * input + output - 1) / output : half;
  return 2 * support + 1;
}

constexpr ResizeTiling cubic_of(int view_height, int view_width, int width, int height) {
  return resize_tiling(view_height, view_width, width, taps_of(width, view_width, 2),
                       taps_of(height, view_height, 2));
}

constexpr ResizeTiling cubic(int size, int width, int height) {
  return cubic_of(size, size, width, height);
}

// The usual case: all columns at once, eight rows of the crop at once.
static_assert(cubic(224, 400, 300).columns == 224 && cubic(224, 400, 300).rows == kWarps);
static_assert(cubic(224, 400, 300).panel == 224, "all weights stay");
static_assert(cubic(96, 250, 250).columns == 96 && cubic(96, 250, 250).panel == 96);
static_assert(cubic(224, 1, 1).columns == 224, "a pixel");
static_assert(cubic(1, 1, 1).columns == 1);
// Larger crops take fewer columns at once, and always some, up to 900 times the view's side.
static_assert(cubic(224, 4000, 3000).columns == 56);
static_assert(cubic(8, 7200, 7200).columns >= 1);
static_assert(cubic(8, 80000, 80000).columns == 0 && cubic(3, 1, 9000).columns == 0, "by pixels");
// Pieces of all kinds, in cases of tests/shared/ops/views_cases.py.
static_assert(cubic(8, 4, 2600).columns == 8 && cubic(8, 4, 2600).panel == 2);
static_assert(cubic(90, 3000, 2).columns == 45 && cubic(90, 3000, 2).rows == 4);
static_assert(!blurs_in_place(90, 89) && blur_tiling(90, 89, 89, kMostSharedBytes).columns == 49);
static_assert(cubic(8192, 16384, 16384).columns >= 32);

constexpr bool fits_of(int view_height, int view_width, int width, int height) {
  const ResizeTiling tiling = cubic_of(view_height, view_width, width, height);
  const int across = taps_of(width, view_width, 2), down = taps_of(height, view_height, 2);
  return tiling.columns >= 1 && tiling.columns <= view_width && tiling.panel <= view_height &&
         tiling.rows <= kWarps && tiling.ring >= down + tiling.rows && tiling.segment % 16 == 0 &&
         resize_bytes(tiling, across, down) <= kSharedBytes;
}
constexpr bool fits(int size, int width, int height) { return fits_of(size, size, width, height); }
constexpr bool every_size_fits() {
  for (const int size : {1, 7, 32, 96, 224, 384, 1024}) {
    for (const int times : {1, 2, 3, 9, 40, 300}) {
      if (!fits(size, size * times, size) || !fits(size, size, size * times) ||
          !fits(size, size * times, size * times) || !fits(size, (size + 1) / 2, 1)) {
        return false;
      }
    }
  }
  return true;
}
static_assert(every_size_fits(), "of crops up to 300 times the side");

// Rectangles: columns are of the width, a panel of rows of the height.
static_assert(cubic_of(64, 224, 400, 120).columns == 224 &&
              cubic_of(64, 224, 400, 120).panel == 64);
static_assert(cubic_of(448, 112, 200, 800).columns == 112);
constexpr bool every_rectangle_fits() {
  for (const int height : {1, 16, 112, 448, 1024}) {
    for (const int width : {1, 16, 112, 448, 1024}) {
      for (const int times : {1, 3, 40}) {
        if (!fits_of(height, width, width * times, height * times) ||
            !fits_of(height, width, width, height * times) ||
            !fits_of(height, width, (width + 1) / 2, 1)) {
          return false;
        }
      }
    }
  }
  return true;
}
static_assert(every_rectangle_fits());

// A segment has room for its pixels at any address.
constexpr bool segments_hold_their_pixels() {
  for (int width = 1; width < 90; ++width) {
    for (int columns = 1; columns <= 8; ++columns) {
      const int taps = taps_of(width, 8, 2);
      const int apart = ((columns - 1) * width + 7) / 8 + 1;
      const int pixels = apart + taps < width ? apart + taps : width;
      if (segment_bytes(columns, 8, width, taps) < 3 * pixels + 15) return false;
    }
  }
  return true;
}
static_assert(segments_hold_their_pixels());

// Blur: a kernel of a tenth of the side.
static_assert(blurs_in_place(224, 11) && shared_bytes(224, 11) == kSharedBytes);
static_assert(blurs_in_place(96, 4) && blur_tiling(96, 4, 4, kSharedBytes).planes == 3);
static_assert(blurs_in_place(320, 16) && !blurs_in_place(384, 19));
static_assert(shared_bytes(384, 19) == kMostSharedBytes);
// In place all columns are done together, whatever the radius.
constexpr bool whole_width_in_place() {
  for (int size = 1; size < 400; ++size) {
    const int half = (size / 10 + 1) / 2;
    for (int radius = 0; radius <= half && blurs_in_place(size, half); ++radius) {
      const BlurTiling tiling = blur_tiling(size, half, radius, shared_bytes(size, half));
      if (tiling.columns < size || tiling.planes == 0) return false;
    }
  }
  return true;
}
static_assert(whole_width_in_place());
// Out of scratch memory a run of columns fits, whatever the radius and the width.
constexpr bool runs_fit() {
  for (const int half : {0, 1, 11, 19, 100, kViewMaxBlur / 2}) {
    const int64_t bytes = shared_bytes_of_runs(half);
    for (const int width : {half + 1, half + 300, kViewMaxSide}) {
      if (bytes > kMostSharedBytes || blur_tiling(width, half, half, bytes).columns < kRun) {
        return false;
      }
    }
  }
  return true;
}
static_assert(runs_fit());
static_assert(shared_bytes_of_runs(11) == kSharedBytes);
static_assert(
    blur_tiling(kViewMaxSide, kViewMaxBlur / 2, kViewMaxBlur / 2, kMostSharedBytes).columns >= kRun,
    "the longest kernel");

}  // namespace m3i::views
