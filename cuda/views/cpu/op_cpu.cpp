// views: both ops on the CPU; kernels in cpu/kernels.h, once for each instruction set.
//
// Threads take views one after the other, each written by one thread: any number gives the same
// bits. They are the call's own, not torch's, whose number a loader does not choose.
#include "views/args.h"
#include "views/cpu/patches.h"
#include "views/draw.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

namespace m3i {
namespace {

using torch::stable::Tensor;

// ---- Drawing ------------------------------------------------------------------------------------

std::vector<ViewDistribution> distributions_of(const std::vector<double>& numbers) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % kViewDistribution == 0,
                  "distribution: expected ", kViewDistribution, " numbers a view, got ",
                  numbers.size(), " in all");
  std::vector<ViewDistribution> views(numbers.size() / kViewDistribution);
  std::memcpy(views.data(), numbers.data(), numbers.size() * sizeof(double));
  for (size_t v = 0; v < views.size(); ++v) {
    const ViewDistribution& of = views[v];
    const auto expect = [&](bool is_right, const char* name, const char* expected) {
      STD_TORCH_CHECK(is_right, "view ", v, ", ", name, ": expected ", expected);
    };
    const auto is_share = [](double value) { return value >= 0 && value <= 1; };
    expect(0 < of.scale[0] && of.scale[0] <= of.scale[1] && of.scale[1] <= 1, "scale",
           "0 < low <= high <= 1");
    expect(0.001 <= of.ratio[0] && of.ratio[0] <= of.ratio[1] && of.ratio[1] <= 1000, "ratio",
           "0.001 <= low <= high <= 1000");
    expect(is_share(of.flip), "flip_probability", "a value in [0, 1]");
    expect(is_share(of.jitter), "jitter_probability", "a value in [0, 1]");
    expect(is_share(of.brightness), "brightness", "a value in [0, 1]");
    expect(is_share(of.contrast), "contrast", "a value in [0, 1]");
    expect(is_share(of.saturation), "saturation", "a value in [0, 1]");
    expect(of.hue >= 0 && of.hue <= 0.5, "hue", "turns in [0, 0.5]");
    expect(is_share(of.gray), "gray_probability", "a value in [0, 1]");
    expect(is_share(of.blur), "blur_probability", "a value in [0, 1]");
    expect(0.001 <= of.sigma[0] && of.sigma[0] <= of.sigma[1] && of.sigma[1] <= 1e6, "blur_sigma",
           "0.001 <= low <= high <= 1e6");
    expect(is_share(of.solarize), "solarize_probability", "a value in [0, 1]");
  }
  return views;
}

void check_picture_size(const int64_t* size, int64_t b, int64_t m) {
  STD_TORCH_CHECK(
      size[0] >= 1 && size[0] <= kViewMaxPicture && size[1] >= 1 && size[1] <= kViewMaxPicture,
      "image_size[", b, ", ", m, "]: expected height and width of 1 to ", kViewMaxPicture,
      " pixels, got ", size[0], " x ", size[1]);
}

Tensor draw_views_cpu(const Tensor& image_size,  // [B, M, 2] int64
                      const Tensor& position,    // [B] int64
                      int64_t seed, std::vector<double> distribution) {
  using torch::headeronly::ScalarType;
  check_dtype(image_size, "image_size", ScalarType::Long);
  check_dtype(position, "position", ScalarType::Long);
  check_shape(position, "position", {kAny});
  check_shape(image_size, "image_size", {position.size(0), kAny, 2});
  check_contiguous(image_size, "image_size");
  check_contiguous(position, "position");
  const std::vector<ViewDistribution> views = distributions_of(distribution);
  const int64_t num_samples = position.size(0), num_pictures = image_size.size(1);
  STD_TORCH_CHECK(num_pictures == 1 || (num_pictures == 2 && views.size() > 1),
                  "image_size: expected one picture a sample, or two for two views and more, got ",
                  num_pictures, " for ", views.size(), " views");
  const auto num_views = static_cast<int64_t>(views.size());
  Tensor params = torch::stable::new_empty(image_size, {num_samples, num_views, kViewColumns},
                                           ScalarType::Float);
  auto* row = static_cast<ViewParams*>(params.mutable_data_ptr());
  const int64_t* positions = position.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < num_samples; ++b) {
    STD_TORCH_CHECK(positions[b] >= 0, "position[", b, "]: expected 0 or more, got ", positions[b]);
    const int64_t* sizes = image_size.const_data_ptr<int64_t>() + b * num_pictures * 2;
    for (int64_t m = 0; m < num_pictures; ++m) check_picture_size(sizes + 2 * m, b, m);
    for (int64_t v = 0; v < num_views; ++v) {
      const int64_t* size = sizes + 2 * view_source(static_cast<int>(v), num_pictures);
      *row++ = views::draw_view(views[v], size[0], size[1], static_cast<uint64_t>(seed),
                                static_cast<uint64_t>(positions[b]), static_cast<uint32_t>(v));
    }
  }
  return params;
}

// ---- Making -------------------------------------------------------------------------------------

// Pictures and parameters of a call, checked.
struct ViewsInput {
  std::vector<ViewImage> images;  // [B, M]
  const ViewParams* params;       // [B, V]
};

ViewsInput check_values(const ViewsCall& call, const Tensor& pixels, const Tensor& offset,
                        const Tensor& image_size, const Tensor& params) {
  ViewsInput input{{}, static_cast<const ViewParams*>(params.const_data_ptr())};
  const int64_t num_bytes = pixels.numel();
  const uint8_t* data = pixels.const_data_ptr<uint8_t>();
  const int64_t* offsets = offset.const_data_ptr<int64_t>();
  const int64_t* sizes = image_size.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < call.num_samples; ++b) {
    for (int64_t m = 0; m < call.num_pictures; ++m) {
      const int64_t at = b * call.num_pictures + m;
      const int64_t height = sizes[2 * at], width = sizes[2 * at + 1];
      check_picture_size(sizes + 2 * at, b, m);
      STD_TORCH_CHECK(offsets[at] >= 0 && offsets[at] <= num_bytes &&
                          height * width <= (num_bytes - offsets[at]) / kViewChannels,
                      "offset[", b, ", ", m, "]: expected a picture of ", height, " x ", width,
                      " x 3 bytes in the ", num_bytes, " of pixels, got one from ", offsets[at]);
      input.images.push_back({data + offsets[at], static_cast<int32_t>(height),
                              static_cast<int32_t>(width), kViewChannels * width});
    }
    for (int64_t v = 0; v < call.num_views; ++v) {
      const ViewParams& row = input.params[b * call.num_views + v];
      const ViewImage& image =
          input.images[b * call.num_pictures + view_source(static_cast<int>(v), call.num_pictures)];
      const char* wrong = wrong_view_param(row, image.height, image.width);
      STD_TORCH_CHECK(!wrong, "params[", b, ", ", v, "]: ", wrong ? wrong : "",
                      ": expected a value as draw_views's for a picture of ", image.height, " x ",
                      image.width, " pixels");
    }
  }
  return input;
}

// body(item, scratch) for items in [0, count), on num_threads threads at most.
template <class Scratch, class Body>
void on_threads(int64_t count, int64_t num_threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Scratch scratch;
    for (int64_t item = next++; item < count; item = next++) body(item, scratch);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(num_threads, count); ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

Tensor make_views_cpu(const Tensor& pixels, const Tensor& offset, const Tensor& image_size,
                      const Tensor& params, std::vector<int64_t> geometry, int64_t num_threads) {
  const ViewsCall call = prepare_make_views(pixels, offset, image_size, params, geometry);
  STD_TORCH_CHECK(num_threads >= 1, "num_threads: expected at least 1, got ", num_threads);
  const ViewsInput input = check_values(call, pixels, offset, image_size, params);
  uint8_t* out = call.out.mutable_data_ptr<uint8_t>();
  const ViewsCpuKernels& kernels = fastest_views_kernels();
  on_threads<ViewScratch>(
      call.num_samples * call.num_views, num_threads, [&](int64_t item, ViewScratch& scratch) {
        const int64_t b = item / call.num_views, v = item % call.num_views;
        const ViewImage& image = input.images[b * call.num_pictures +
                                              view_source(static_cast<int>(v), call.num_pictures)];
        const int64_t bytes = (call.begin[v + 1] - call.begin[v]) / call.num_samples;
        kernels.make_view(image, call.geometry[v], input.params[item],
                          out + call.begin[v] + b * bytes, scratch);
      });
  return call.out;
}

// Grids of a call, checked.
const ViewGrid* check_grids(const ViewsCall& call, const Tensor& grids, int64_t patch_size,
                            const std::vector<int64_t>& lengths) {
  const auto* grid = static_cast<const ViewGrid*>(grids.const_data_ptr());
  const int64_t most = kViewMaxSide / patch_size;
  for (int64_t b = 0; b < call.num_samples; ++b) {
    for (int64_t v = 0; v < call.num_views; ++v) {
      const ViewGrid& of = grid[b * call.num_views + v];
      STD_TORCH_CHECK(of.rows >= 1 && of.rows <= most && of.columns >= 1 && of.columns <= most,
                      "grids[", b, ", ", v, "]: expected 1 to ", most, " rows and columns, got ",
                      of.rows, " x ", of.columns);
      STD_TORCH_CHECK(of.first >= 0 && of.first <= lengths[v] - of.rows * of.columns, "grids[", b,
                      ", ", v, "]: expected ", of.rows, " x ", of.columns, " patches in the ",
                      lengths[v], " of the view, got them from ", of.first);
    }
  }
  return grid;
}

Tensor make_patches_cpu(const Tensor& pixels, const Tensor& offset, const Tensor& image_size,
                        const Tensor& params, const Tensor& grids, std::vector<int64_t> filters,
                        int64_t patch_size, std::vector<int64_t> lengths, int64_t num_threads) {
  const ViewsCall call =
      prepare_make_patches(pixels, offset, image_size, params, grids, filters, patch_size, lengths);
  STD_TORCH_CHECK(num_threads >= 1, "num_threads: expected at least 1, got ", num_threads);
  const ViewsInput input = check_values(call, pixels, offset, image_size, params);
  const ViewGrid* grid = check_grids(call, grids, patch_size, lengths);
  uint8_t* out = call.out.mutable_data_ptr<uint8_t>();
  const int64_t patch_bytes = kViewChannels * patch_size * patch_size;
  on_threads<PatchScratch>(
      call.num_samples * call.num_views, num_threads, [&](int64_t item, PatchScratch& scratch) {
        const int64_t b = item / call.num_views, v = item % call.num_views;
        const ViewImage& image = input.images[b * call.num_pictures +
                                              view_source(static_cast<int>(v), call.num_pictures)];
        make_patches(image, call.geometry[v], input.params[item], grid[item],
                     static_cast<int>(patch_size),
                     out + call.begin[v] + grid[item].first * patch_bytes, scratch);
      });
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) {
  library.impl("draw_views", TORCH_BOX(&draw_views_cpu));
  library.impl("make_views", TORCH_BOX(&make_views_cpu));
  library.impl("make_patches", TORCH_BOX(&make_patches_cpu));
}

}  // namespace
}  // namespace m3i
