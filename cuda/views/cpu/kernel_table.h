// views on the CPU: the table of kernels of one instruction set, and the function that callers use.
//
// Neither torch nor DALI is known here: both operators call make_views.
#pragma once

#include "views/params.h"

#include <cstddef>
#include <memory>

namespace m3i {

// Memory that calls use again, of one thread. It grows to the largest picture and view seen.
class ViewScratch {
 public:
  // At least `bytes` bytes, aligned to 64, uninitialised, until the next call.
  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      memory_.reset(new uint8_t[bytes + kAlignment]);
      size_ = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<uint8_t[]> memory_;
  size_t size_ = 0;
};

struct ViewsCpuKernels {
  // Writes one view, [3, H, W]. The crop lies in the picture, and the geometry is within its limits
  // (params.h).
  void (*make_view)(const ViewImage& image, const ViewGeometry& geometry, const ViewParams& params,
                    uint8_t* out, ViewScratch& scratch);
};

extern const ViewsCpuKernels kViewsBaseline;
#if defined(__x86_64__)
extern const ViewsCpuKernels kViewsAvx2;
extern const ViewsCpuKernels kViewsAvx512;
#endif

// Those of the best instruction set of this machine.
const ViewsCpuKernels& fastest_views_kernels();

// Writes all views of one sample: out[v], [3, H, W] of geometry[v], for v in [0, num_views).
// `images`: one, or two of which the second is that of view 1.
inline void make_views(const ViewImage* images, int num_images, const ViewGeometry* geometry,
                       const ViewParams* params, int num_views, uint8_t* const* out,
                       ViewScratch& scratch) {
  const ViewsCpuKernels& kernels = fastest_views_kernels();
  for (int v = 0; v < num_views; ++v) {
    kernels.make_view(images[view_source(v, num_images)], geometry[v], params[v], out[v], scratch);
  }
}

// What is wrong with a view's parameters for a picture: null, or the name of the first that is.
inline const char* wrong_view_param(const ViewParams& p, int64_t height, int64_t width) {
  const auto whole = [](float value, double low, double high) {
    return value >= low && value <= high &&
           static_cast<float>(static_cast<int64_t>(value)) == value;
  };
  const auto real = [](float value, double low, double high) {
    return value >= low && value <= high;  // and no NaN
  };
  if (!whole(p.height, 1, static_cast<double>(height))) return "height";
  if (!whole(p.width, 1, static_cast<double>(width))) return "width";
  if (!whole(p.y, 0, static_cast<double>(height) - static_cast<double>(p.height))) return "y";
  if (!whole(p.x, 0, static_cast<double>(width) - static_cast<double>(p.width))) return "x";
  if (!whole(p.flip, 0, 1)) return "flip";
  if (!real(p.brightness, 0, 1e6)) return "brightness";
  if (!real(p.contrast, 0, 1e6)) return "contrast";
  if (!real(p.saturation, 0, 1e6)) return "saturation";
  if (!real(p.hue, -0.5, 0.5)) return "hue";
  if (!whole(p.order, 0, kViewOrders - 1)) return "order";
  if (!whole(p.gray, 0, 1)) return "gray";
  if (p.sigma != 0 && !real(p.sigma, 1e-3, 1e6)) return "sigma";
  if (!whole(p.solarize, 0, 1)) return "solarize";
  return nullptr;
}

}  // namespace m3i
