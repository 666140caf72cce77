// views: registration for CUDA.
#include "m3i/host/cuda_stream.h"
#include "views/args.h"
#include "views/op.h"

#include <torch/csrc/stable/library.h>

#include <limits>

namespace m3i {
namespace {

using torch::stable::Tensor;

// Checks what CUDA limits, and fills in all but what the plan does. num_threads is the CPU's.
ViewsCudaParams params_of(const ViewsCall& call, const Tensor& pixels, const Tensor& offset,
                          const Tensor& image_size, const Tensor& params, int64_t num_threads) {
  STD_TORCH_CHECK(num_threads >= 1, "num_threads: expected at least 1, got ", num_threads);
  STD_TORCH_CHECK(call.num_views <= kViewsMostOnCuda, "geometry: expected up to ", kViewsMostOnCuda,
                  " views of a sample on CUDA, got ", call.num_views);
  STD_TORCH_CHECK(call.num_samples * call.num_views <= std::numeric_limits<int32_t>::max(),
                  "params: expected fewer than 2^31 views, got ", call.num_samples, " x ",
                  call.num_views);
  ViewsCudaParams launched{};
  launched.pixels = pixels.const_data_ptr<uint8_t>();
  launched.offset = offset.const_data_ptr<int64_t>();
  launched.image_size = image_size.const_data_ptr<int64_t>();
  launched.num_bytes = pixels.numel();
  launched.params = static_cast<const ViewParams*>(params.const_data_ptr());
  launched.num_samples = static_cast<int32_t>(call.num_samples);
  launched.num_pictures = static_cast<int32_t>(call.num_pictures);
  return launched;
}

std::vector<uint8_t*> places_of(const ViewsCall& call) {
  uint8_t* out = call.out.mutable_data_ptr<uint8_t>();
  std::vector<uint8_t*> places;
  for (int64_t v = 0; v < call.num_views; ++v) places.push_back(out + call.begin[v]);
  return places;
}

Tensor launch(const ViewsCall& call, const Tensor& pixels, int64_t scratch_bytes,
              ViewsCudaParams& launched) {
  const Tensor scratch = torch::stable::new_empty(pixels, {scratch_bytes});
  launched.scratch = scratch_bytes ? scratch.mutable_data_ptr<uint8_t>() : nullptr;
  STD_CUDA_CHECK(launch_views(launched, current_stream(pixels)));
  return call.out;
}

Tensor make_views_cuda(const Tensor& pixels, const Tensor& offset, const Tensor& image_size,
                       const Tensor& params, std::vector<int64_t> geometry, int64_t num_threads) {
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  const ViewsCall call = prepare_make_views(pixels, offset, image_size, params, geometry);
  for (const ViewGeometry& view : call.geometry) {
    STD_TORCH_CHECK(view.height == view.width, "geometry: expected square views on CUDA, got ",
                    view.height, " x ", view.width, " pixels; make_patches cuts any");
  }
  ViewsCudaParams launched = params_of(call, pixels, offset, image_size, params, num_threads);
  const int64_t scratch_bytes = plan_views(call.geometry.data(), static_cast<int>(call.num_views),
                                           places_of(call).data(), launched);
  return launch(call, pixels, scratch_bytes, launched);
}

Tensor make_patches_cuda(const Tensor& pixels, const Tensor& offset, const Tensor& image_size,
                         const Tensor& params, const Tensor& grids, std::vector<int64_t> filters,
                         int64_t patch_size, std::vector<int64_t> lengths, int64_t num_threads) {
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  const ViewsCall call =
      prepare_make_patches(pixels, offset, image_size, params, grids, filters, patch_size, lengths);
  ViewsCudaParams launched = params_of(call, pixels, offset, image_size, params, num_threads);
  launched.grids = static_cast<const ViewGrid*>(grids.const_data_ptr());
  const int64_t scratch_bytes =
      plan_patches(call.geometry.data(), static_cast<int>(call.num_views), lengths.data(),
                   static_cast<int>(patch_size), places_of(call).data(), launched);
  return launch(call, pixels, scratch_bytes, launched);
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("make_views", TORCH_BOX(&make_views_cuda));
  library.impl("make_patches", TORCH_BOX(&make_patches_cuda));
}

}  // namespace
}  // namespace m3i
