// views: structures of the host functions, the CPU kernels, the launchers and the device code.
//
// A view is one crop of a decoded picture, resized and changed in its colours, step by step, each
// step rounded to uint8 as torchvision.transforms.v2.functional does on uint8 tensors:
//
//   crop -> antialiased resize -> horizontal flip -> brightness, contrast, saturation and hue in a
//   drawn order -> grayscale -> Gaussian blur -> solarize
#pragma once

#include "m3i/types.h"

namespace m3i {

inline constexpr int kViewChannels = 3;

// Places of a value in a ViewParams, and columns of draw_views's output.
inline constexpr int kViewColumns = 13;

// Orders of brightness, contrast, saturation and hue; number n is the n-th of the permutations of
// (0, 1, 2, 3), sorted.
inline constexpr int kViewOrders = 24;

// Values of 128 and more are inverted.
inline constexpr float kSolarizeThreshold = 128.0f;

// Longest blur kernel. Sides are limited so that a view's offsets fit 32 bits.
inline constexpr int kViewMaxBlur = 1023;
inline constexpr int kViewMaxSide = 16384;

// Side of a picture, at most: the sums of antialiased weights stay exact.
inline constexpr int kViewMaxPicture = 1 << 24;

// The parameters of one view, one row of draw_views's output.
struct ViewParams {
  float y, x, height, width;  // the crop in pixels of the picture, whole numbers
  float flip;                 // 0 or 1
  float brightness;           // factor, 1: unchanged
  float contrast;             // factor about the mean gray of the view, 1: unchanged
  float saturation;           // factor, 1: unchanged
  float hue;                  // turns, in [-0.5, 0.5], 0: unchanged
  float order;                // 0 to 23, of the four above
  float gray;                 // 0 or 1
  float sigma;                // of the blur, in pixels of the view, 0: none
  float solarize;             // 0 or 1
};
static_assert(sizeof(ViewParams) == kViewColumns * sizeof(float), "a row of draw_views's output");

// What a view's parameters do not say.
struct ViewGeometry {
  int32_t height, width;     // of the view in pixels
  int32_t blur_kernel_size;  // odd, of which half is less than either
  int32_t cubic;             // 1: bicubic, 0: bilinear
};

// Numbers of a view's geometry in the arguments of the operators, in this order.
inline constexpr int kViewGeometry = 4;

// A view that is cut to a grid of patches of P pixels along a side, row by row: where its
// [rows * columns, 3, P, P] is among the patches of the same view of all samples.
struct ViewGrid {
  int64_t rows, columns;  // of patches
  int64_t first;          // patches before its own
};

// What its parameters do not say: `filter` has the kernel of a blur, which is cut short where the
// view's reflections allow no longer one, and whether the resize is bicubic.
M3I_HOST_DEVICE inline ViewGeometry geometry_of(const ViewGrid& grid, int patch_size,
                                                const ViewGeometry& filter) {
  const auto height = static_cast<int32_t>(grid.rows * patch_size);
  const auto width = static_cast<int32_t>(grid.columns * patch_size);
  const int32_t longest = 2 * (height < width ? height : width) - 1;
  const int32_t blur = filter.blur_kernel_size < longest ? filter.blur_kernel_size : longest;
  return {height, width, blur, filter.cubic};
}

// A decoded picture: [height, width, 3] uint8, pixels of a row one after the other.
struct ViewImage {
  const uint8_t* data;
  int32_t height, width;
  int64_t row_stride;  // bytes from a row to the next
};

// How the parameters of a view are drawn.
struct ViewDistribution {
  double scale[2];    // the crop's area as a share of the picture's
  double ratio[2];    // the crop's width / height, log-uniform
  double flip;        // probability
  double jitter;      // probability that the next four are drawn
  double brightness;  // half-widths of uniform ranges about 1
  double contrast;
  double saturation;
  double hue;       // half-width about 0, in turns
  double gray;      // probability
  double blur;      // probability
  double sigma[2];  // uniform
  double solarize;  // probability
};
inline constexpr int kViewDistribution = sizeof(ViewDistribution) / sizeof(double);

// Which picture of a sample view `view` is cut of: with two pictures, view 1 of the second.
M3I_HOST_DEVICE inline int view_source(int view, int num_pictures) {
  return num_pictures == 2 && view == 1 ? 1 : 0;
}

}  // namespace m3i
