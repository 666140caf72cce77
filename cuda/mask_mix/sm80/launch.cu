// mask_mix: launcher.
#include "mask_mix/op.h"

#include "m3i/dispatch.h"
#include "m3i/host/launch.h"
#include "mask_mix/sm80/kernels.cuh"

#include <algorithm>

namespace m3i {

cudaError_t launch_mask_mix(const MaskMixParams& params, cudaStream_t stream) {
  using namespace mask_mix;
  const int64_t plane = params.height * params.width;
  if (params.num_pictures == 0 || plane == 0) return cudaSuccess;

  const int pixels = pixels_per_thread(params.width / params.grid_width, plane,
                                       reinterpret_cast<uintptr_t>(params.views));
  const dim3 grid(static_cast<unsigned>(blocks_per_plane(plane, pixels)),
                  static_cast<unsigned>(std::min<int64_t>(params.num_pictures, kMaxGridY)));
  return dispatch_dtype<float, BFloat16>(params.out_dtype, [&](auto out) {
    return dispatch_int<kWideGroup, 4, 2, 1>(pixels, [&](auto size) {
      const auto kernel = mask_mix_kernel<typename decltype(out)::type, decltype(size)::value>;
      return launch(kernel, grid, kThreads, stream, params);
    });
  });
}

}  // namespace m3i
