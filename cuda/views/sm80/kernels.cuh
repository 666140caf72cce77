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
// Bytes by closed form (m3i_fast/costs/view_cost.py): a picture is read from memory once and a view
// written once; each of the phases 2 and 3 reads and writes the view again, in cache. What bounds
// the kernel by that is loads from shared memory, a byte each.
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

// Contrast and the steps after it, of a view that stands at `view`.
template <int kPixels, class Layout>
__device__ inline void colour_again(uint8_t* view, const Layout& layout, const ColourPlan& plan,
                                    float mean) {
  const int plane = layout.channel();
  for (int i = static_cast<int>(threadIdx.x) * kPixels; i < layout.pixels();
       i += kThreads * kPixels) {
    const int at = layout.pixel(i);
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

// What is the same for all threads of the block, in shared memory: registers are few.
template <class Layout>
struct View {
  ColourPlan plan;
  Resize resized;
  Blur<Layout> blurred;
  uint8_t* out;
  uint8_t* at;  // until a blur writes it to `out`
  Layout layout;
  bool flips, blurs;
};

// Fills in how a view lies; returns its first byte among those of its view of all samples.
__device__ inline int64_t lay_out(const ViewsCudaParams&, const ViewTarget& target, int64_t sample,
                                  int, Square& to) {
  to.size = target.size;
  to.area = target.size * target.size;
  const int64_t begin = sample * kViewChannels * to.area;
  return begin;
}

__device__ inline int64_t lay_out(const ViewsCudaParams& params, const ViewTarget& target,
                                  int64_t sample, int view, Patches& to) {
  const ViewGrid grid = params.grids[sample * params.num_views + view];
  const int most = kViewMaxSide / params.patch_size;
  if (grid.rows < 1 || grid.columns < 1 || grid.rows > most || grid.columns > most ||
      grid.first < 0 || grid.first > target.size - grid.rows * grid.columns) {
    __trap();
  }
  to.size = params.patch_size;
  to.area = params.patch_size * params.patch_size;
  to.rows = static_cast<int>(grid.rows);
  to.columns = static_cast<int>(grid.columns);
  return grid.first * to.patch();
}

// By the whole block; ends with a barrier.
template <class Layout>
__device__ inline void plan_view(const ViewsCudaParams& params, View<Layout>& to) {
  const int view = static_cast<int>(blockIdx.x % params.num_views);
  const int64_t sample = blockIdx.x / params.num_views;
  const ViewTarget& target = params.targets[view];
  const ViewParams& of = params.params[sample * params.num_views + view];
  if (threadIdx.x == 0) {
    const int source = view_source(view, params.num_pictures);
    const ViewImage image = image_of(params, sample * params.num_pictures + source);
    const int64_t begin = lay_out(params, target, sample, view, to.layout);
    const int height = to.layout.height(), width = to.layout.width();
    start_resize(crop_of(image, of), height, width, target.cubic, to.resized);
    if (!(of.order >= 0 && of.order < kViewOrders)) __trap();
    to.plan = colour_plan(of);
    to.flips = of.flip != 0;
    to.blurs = of.sigma != 0;
    to.out = to.at = target.out + begin;
    if (to.blurs && target.scratch_page != kViewsNoScratch) {
      to.at = params.scratch + kViewsPage * target.scratch_page + begin;
    }
    to.blurred.from = to.at;
    to.blurred.to = to.out;
    to.blurred.layout = to.layout;
    to.blurred.solarizes = of.solarize != 0;
    to.blurred.half = min(target.blur_kernel_size / 2, min(height, width) - 1);
    to.blurred.sigma = of.sigma;
    to.blurred.shared_bytes = params.shared_bytes;
  }
  __syncthreads();
  plan_precisions(to.resized);
}

// Takes a pixel of the resize through the steps before contrast to its place, and returns its gray.
template <class Layout>
__device__ inline uint32_t put_pixel(const View<Layout>& view, int row, int column,
                                     const int* levels) {
  const Pixel pixel = with_steps(
      {static_cast<float>(levels[0]), static_cast<float>(levels[1]), static_cast<float>(levels[2])},
      view.plan, 0, view.plan.contrast_at, 0);
  const Layout& layout = view.layout;
  const int x = view.flips ? layout.width() - 1 - column : column;
  uint8_t* at = view.at + layout.row(0, row) + layout.column(x);
  at[0] = static_cast<uint8_t>(pixel.r);
  at[layout.channel()] = static_cast<uint8_t>(pixel.g);
  at[2 * layout.channel()] = static_cast<uint8_t>(pixel.b);
  return static_cast<uint32_t>(gray_of(pixel));
}

// A call, since it is rare and its registers are not.
template <class Layout>
__device__ inline __attribute__((noinline)) uint32_t put_by_pixels(const View<Layout>& view) {
  uint32_t gray = 0;
  resize_by_pixels(view.resized, [&](int row, int column, const int* levels) {
    gray += put_pixel(view, row, column, levels);
  });
  return gray;
}

// By the whole block, which makes one view.
template <class Layout>
__device__ inline void make_view(const ViewsCudaParams& params) {
  __shared__ View<Layout> view;
  plan_view(params, view);
  uint32_t gray = 0;  // of this thread's pixels, of which there are 2^20 at most
  if (view.resized.tiling.columns > 0) {
    resize(view.resized, [&](int row, int column, const int* levels) {
      gray += put_pixel(view, row, column, levels);
    });
  } else {
    gray = put_by_pixels(view);
  }
  if (view.plan.contrast_at < view.plan.count) {
    const int64_t sum =
        over_block(static_cast<int64_t>(gray), [](int64_t a, int64_t b) { return a + b; });
    const float mean = gray_mean(sum, view.layout.pixels());
    if (view.layout.channel() % 4 == 0 && reinterpret_cast<uint64_t>(view.at) % 4 == 0) {
      colour_again<4>(view.at, view.layout, view.plan, mean);
    } else {
      colour_again<1>(view.at, view.layout, view.plan, mean);
    }
  }
  if (view.blurs) {
    plan_blur(view.blurred);
    blur(view.blurred);
  }
}

// Grid: x over samples and, faster, views: those of one picture run side by side, so that it comes
// from memory once.
template <int kThreads_>
__global__ void __launch_bounds__(kThreads_, kMinBlocks)
    views_kernel(const __grid_constant__ ViewsCudaParams params) {
  make_view<Square>(params);
}

// The same of views of any sides, as patches. A kernel of its own, since a pixel's place among
// patches takes two divisions, and squares none.
template <int kThreads_>
__global__ void __launch_bounds__(kThreads_, kMinBlocks)
    views_patches_kernel(const __grid_constant__ ViewsCudaParams params) {
  make_view<Patches>(params);
}

}  // namespace m3i::views
