// views: launcher.
#include "views/op.h"

#include "m3i/host/launch.h"
#include "views/sm80/kernels.cuh"

#include <algorithm>

namespace m3i {

int64_t plan_views(const ViewGeometry* geometry, int num_views, uint8_t* const* out,
                   ViewsCudaParams& params) {
  int64_t shared = views::kSharedBytes, pages = 0;
  for (int v = 0; v < num_views; ++v) {
    const ViewGeometry& view = geometry[v];
    const int32_t size = view.height;  // square, as both operators check
    const int half = view.blur_kernel_size / 2;
    ViewTarget& target = params.targets[v];
    target = {out[v], size, static_cast<int16_t>(view.blur_kernel_size),
              static_cast<int16_t>(view.cubic), kViewsNoScratch};
    shared = std::max(shared, views::shared_bytes(size, half));
    if (views::blurs_in_place(size, half)) continue;
    target.scratch_page = static_cast<uint32_t>(pages);
    const int64_t bytes = static_cast<int64_t>(params.num_samples) * kViewChannels * size * size;
    pages += (bytes + kViewsPage - 1) / kViewsPage;
  }
  params.num_views = num_views;
  params.shared_bytes = static_cast<int32_t>(shared);
  return pages * kViewsPage;
}

int64_t plan_patches(const ViewGeometry* geometry, int num_views, const int64_t* lengths,
                     int patch_size, uint8_t* const* out, ViewsCudaParams& params) {
  int64_t shared = views::kSharedBytes, pages = 0;
  for (int v = 0; v < num_views; ++v) {
    const ViewGeometry& view = geometry[v];
    params.targets[v] = {out[v], static_cast<int32_t>(lengths[v]),
                         static_cast<int16_t>(view.blur_kernel_size),
                         static_cast<int16_t>(view.cubic), static_cast<uint32_t>(pages)};
    shared = std::max(shared, views::shared_bytes_of_runs(view.blur_kernel_size / 2));
    const int64_t bytes = lengths[v] * kViewChannels * patch_size * patch_size;
    pages += (bytes + kViewsPage - 1) / kViewsPage;
  }
  params.num_views = num_views;
  params.patch_size = patch_size;
  params.shared_bytes = static_cast<int32_t>(shared);
  return pages * kViewsPage;
}

cudaError_t launch_views(const ViewsCudaParams& params, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(params.num_samples) * params.num_views;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxGridX) return cudaErrorInvalidConfiguration;
  const auto kernel = params.grids ? &views::views_patches_kernel<views::kThreads>
                                   : &views::views_kernel<views::kThreads>;
  return launch_with_shared(kernel, static_cast<unsigned>(blocks), views::kThreads,
                            static_cast<size_t>(params.shared_bytes), stream, params);
}

}  // namespace m3i
