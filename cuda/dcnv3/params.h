// dcnv3: parameters of the CPU kernels, the launchers and the device code.
//
// A point is one sample of the kernel's window: kernel_width columns by kernel_height rows, counted
// column by column (x-major), the centre left out where remove_center is set. Point (i, j) of the
// output pixel (oy, ox), i its column, reads x at
//
//   loc_x = ox * stride_width - pad_width + c + (i * dilation_width - c + offset_x) * offset_scale
//   c = dilation_width * (kernel_width - 1) / 2  (rounded down), and likewise for y.
//
// It is valid where -1 < loc_x < width and -1 < loc_y < height, which fails for NaN: test this
// before any conversion to an integer. Then y0 = floor(loc_y), ly = loc_y - y0, likewise x, and
//
//   sample = (1-ly)(1-lx) x[y0, x0] + (1-ly) lx x[y0, x0+1] + ly (1-lx) x[y0+1, x0] + ly lx ...
//   out[n, oy, ox, g, :] = sum over points of m * sample,  m = mask, or its softmax over the points
//
// where x outside the image is zero. All summands but the offset are integers times offset_scale:
// whole and fractional parts are kept apart, so that a wide image or a large offset costs no
// precision.
//
// A point is lost if an offset is NaN or infinite (loc - floor(loc) is NaN), or if it is not valid
// and its m is NaN or infinite (m * 0 is NaN). It is then put at (-1, -1), where the image's first
// pixel is its only corner, with lx = ly = NaN: the output, the gradients by its offset and mask,
// and the gradient by this pixel of x are NaN. A point with a finite offset far outside is not
// lost, even where loc_x is infinite in float32.
#pragma once

#include "m3i/types.h"

namespace m3i {

// Extents and geometry of one call. All arrays are contiguous, row-major, of one dtype;
// (height + 3) * (width + 2) is below 2^31 and a padded image's extents are at most 2^28; the
// product of all extents may be larger.
struct Dcnv3Shape {
  int64_t batch;       // N
  int64_t height;      // H
  int64_t width;       // W
  int64_t out_height;  // Ho
  int64_t out_width;   // Wo
  int64_t groups;      // G
  int64_t group_size;  // D, channels of a group; C = G * D
  int64_t points;      // K = kernel_height * kernel_width, less 1 without the centre
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
  int64_t dilation_height, dilation_width;
  double offset_scale;
  bool remove_center;
  bool softmax;  // mask holds logits, to be normalised over the points
};

struct Dcnv3Params {
  Dcnv3Shape shape;
  DType dtype;
  const void* x;       // [N, H, W, G, D]
  const void* offset;  // [N, Ho, Wo, G, K, 2] (x, y)
  const void* mask;    // [N, Ho, Wo, G, K]
  void* out;           // [N, Ho, Wo, G, D]
};

// A gradient that is not needed is null.
struct Dcnv3BwdParams {
  Dcnv3Shape shape;
  DType dtype;
  const void* grad_out;  // [N, Ho, Wo, G, D]
  const void* x;         // [N, H, W, G, D]
  const void* offset;    // [N, Ho, Wo, G, K, 2] (x, y)
  const void* mask;      // [N, Ho, Wo, G, K]
  void* grad_x;          // [N, H, W, G, D]
  void* grad_offset;     // [N, Ho, Wo, G, K, 2]
  void* grad_mask;       // [N, Ho, Wo, G, K] of the logits where softmax is set
};

}  // namespace m3i
