// The one way a kernel is launched here. Plain C++: no <<<>>>, so any C++ compiler builds a
// launcher.
#pragma once

#include <cuda_runtime.h>

namespace m3i {

// CUDA's limits of a grid's extents (compute capability 3.0 and later).
inline constexpr long long kMaxGridX = 2147483647;
inline constexpr long long kMaxGridY = 65535;

// Queues kernel(args...) on the stream and returns the launch's error; nothing waits.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
}

}  // namespace m3i
