// views: device code. What a view is stands in params.h, its arithmetic in arithmetic.h.
//
// A block makes one view, in one to three phases, with a barrier between:
//
//   1 crop and resize (resize.cuh), colour steps up to contrast, and the sum of gray for its mean
//   2 contrast and the steps after it, where contrast is drawn: the mean needs the whole view
//   3 blur (blur.cuh) and solarize, where a blur is drawn
//
// A block owns its view because contrast and blur, of which most views of a self-supervised recipe
// draw one, need more than a tile of it; tiles of blocks of their own would have to wait for each
// other, or resize twice. Between phases the view stands as uint8 where it is going: 150 KB of 224
// pixels, which are in the second-level cache. A view in shared memory was rejected: 147 KiB leave
// one block on a multiprocessor, for small views of the same launch as well.
//
// Bytes by closed form (tests/cuda/views/roofline.py, ROOFLINE.md): a crop is read once and a view
// written once from and to memory; each of the phases 2 and 3 reads and writes the view again, in
// cache.
//
// The launch cannot check what is on the device; see launch_views for what traps.
#pragma once

#include "views/launch_params.h"
#include "views/sm80/blur.cuh"
#include "views/sm80/resize.cuh"

namespace m3i::views {

// ---- What a block makes -------------------------------------------------------------------------

__device__ inline ViewImage image_of(const ViewsCudaParams& params, int64_t place) {
  if (params.images) return params.images[place];
  ViewImage image;
  const int64_t height = params.image_size[2 * place], width = params.image_size[2 * place + 1];
  const int64_t offset = params.offset[place];
  if (height < 1 || width < 1 || height > kViewMaxPicture || width > kViewMaxPicture ||
      offset < 0 || offset + kViewChannels * height * width > params.num_bytes) {
    __trap();
  }
  image.data = params.pixels + offset;
  image.height = static_cast<int32_t>(height);
  image.width = static_cast<int32_t>(width);
  image.row_stride = kViewChannels * width;
  return image;
}

__device__ inline Crop crop_of(const ViewImage& image, const ViewParams& params) {
  // A conversion saturates, and makes a NaN 0.
  const auto y = static_cast<int32_t>(params.y), x = static_cast<int32_t>(params.x);
  const auto height = static_cast<int32_t>(params.height);
  const auto width = static_cast<int32_t>(params.width);
  if (y < 0 || x < 0 || height < 1 || width < 1 || height > image.height - y ||
      width > image.width - x) {
    __trap();
  }
  return {image.data + y * image.row_stride + static_cast<int64_t>(x) * kViewChannels,
          image.row_stride, height, width};
}

// ---- Colours ------------------------------------------------------------------------------------

__device__ inline Pixel with_steps(Pixel pixel, const ColourPlan& plan, int begin, int end,
                                   float mean) {
  for (int i = begin; i < end; ++i) pixel = coloured(pixel, plan, plan.step[i], mean);
  return pixel;
}

// Steps [plan.contrast_at, plan.count) of a view that stands at `view`, [3, plane].
template <int kPixels>
__device__ inline void colour_again(uint8_t* view, int plane, const ColourPlan& plan, float mean) {
  for (int at = static_cast<int>(threadIdx.x) * kPixels; at < plane; at += kThreads * kPixels) {
    Vec<uint8_t, kPixels> levels[kViewChannels];
#pragma unroll
    for (int c = 0; c < kViewChannels; ++c) {
      levels[c] = load_written<kPixels>(view + c * plane + at);
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const Pixel pixel =
          with_steps({static_cast<float>(levels[0].at[i]), static_cast<float>(levels[1].at[i]),
                      static_cast<float>(levels[2].at[i])},
                     plan, plan.contrast_at, plan.count, mean);
      levels[0].at[i] = static_cast<uint8_t>(pixel.r);
      levels[1].at[i] = static_cast<uint8_t>(pixel.g);
      levels[2].at[i] = static_cast<uint8_t>(pixel.b);
    }
#pragma unroll
    for (int c = 0; c < kViewChannels; ++c) store(view + c * plane + at, levels[c]);
  }
}

// ---- Kernel -------------------------------------------------------------------------------------

// Grid: x over views and, faster, samples: views in the order of the call, of which the largest
// come first.
template <int kThreads_>
__global__ void __launch_bounds__(kThreads_, kMinBlocks)
    views_kernel(const __grid_constant__ ViewsCudaParams params) {
  __shared__ ColourPlan plan;
  __shared__ Resize resized;
  __shared__ Blur blurred;
  const int view = static_cast<int>(blockIdx.x / params.num_samples);
  const int64_t sample = blockIdx.x % params.num_samples;
  const ViewTarget& target = params.targets[view];
  const ViewParams& of = params.params[sample * params.num_views + view];
  const ViewImage image =
      image_of(params, sample * params.num_pictures + view_source(view, params.num_pictures));
  const Crop crop = crop_of(image, of);
  if (threadIdx.x == 0) {
    if (!(of.order >= 0 && of.order < kViewOrders)) __trap();
    plan = colour_plan(of);
  }

  const int size = target.size, plane = size * size;
  plan_resize(crop, size, target.cubic, resized);
  const int64_t begin = sample * kViewChannels * plane;
  uint8_t* out = target.out + begin;
  uint8_t* view_at = out;  // until a blur writes it to its place
  const bool blurs = of.sigma != 0, flips = of.flip != 0;
  if (blurs && target.scratch_page != kViewsNoScratch) {
    view_at = params.scratch + kViewsPage * target.scratch_page + begin;
  }
  unsigned long long gray = 0;
  const bool has_contrast = plan.contrast_at < plan.count;
  resize(resized, [&](int row, int column, const int* levels) {
    const Pixel pixel = with_steps({static_cast<float>(levels[0]), static_cast<float>(levels[1]),
                                    static_cast<float>(levels[2])},
                                   plan, 0, plan.contrast_at, 0);
    if (has_contrast) gray += static_cast<unsigned>(gray_of(pixel));
    uint8_t* at = view_at + row * size + (flips ? size - 1 - column : column);
    at[0] = static_cast<uint8_t>(pixel.r);
    at[plane] = static_cast<uint8_t>(pixel.g);
    at[2 * plane] = static_cast<uint8_t>(pixel.b);
  });
  if (has_contrast) {
    const auto sum = over_block(gray, [](auto a, auto b) { return a + b; });
    const float mean = gray_mean(static_cast<int64_t>(sum), plane);
    if (plane % 4 == 0 && reinterpret_cast<uintptr_t>(view_at) % 4 == 0) {
      colour_again<4>(view_at, plane, plan, mean);
    } else {
      colour_again<1>(view_at, plane, plan, mean);
    }
  }
  if (!blurs) return;
  if (threadIdx.x == 0) {
    blurred.from = view_at;
    blurred.to = out;
    blurred.size = size;
    blurred.solarizes = of.solarize != 0;
    blurred.half = target.blur_kernel_size / 2;
  }
  plan_blur(blurred, of.sigma, params.shared_bytes);
  blur(blurred);
}

}  // namespace m3i::views
