// The launch of kernels, in plain C++ without <<<>>>, so that any C++ compiler builds a launcher.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "m3i/host/device.h"

namespace m3i {

// CUDA's limits of a grid's extents (compute capability 3.0 and later).
inline constexpr long long kMaxGridX = 2147483647;
inline constexpr long long kMaxGridY = 65535;

// Shared memory of a block, static and dynamic, that a kernel may use without raising its limit.
inline constexpr size_t kSharedUnasked = 48 * 1024;
// The most static shared memory of a kernel that has dynamic shared memory, too.
inline constexpr size_t kMostStaticShared = 2 * 1024;

// Raises a kernel's limit of dynamic shared memory. All sizes ask for the same, so that no thread
// takes from another one what that is about to launch with.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t dynamic_bytes) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int allowed =
      std::max(most - static_cast<int>(kMostStaticShared), static_cast<int>(dynamic_bytes));
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
}

// Launches kernel(args...) with `config`, after raising its limit of shared memory.
template <class... Params, class... Args>
cudaError_t launch_config(const cudaLaunchConfig_t& config, void (*kernel)(Params...),
                          Args&&... args) {
  if (config.dynamicSmemBytes + kMostStaticShared > kSharedUnasked) {
    const cudaError_t error = allow_shared(kernel, config.dynamicSmemBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
}

// Launches kernel(args...) with `shared_bytes` of dynamic shared memory on the stream and returns
// the launch's error, without a synchronisation.
template <class... Params, class... Args>
cudaError_t launch_with_shared(void (*kernel)(Params...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return launch_config(config, kernel, static_cast<Args&&>(args)...);
}

// As above, without dynamic shared memory.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                   Args&&... args) {
  return launch_with_shared(kernel, grid, block, 0, stream, static_cast<Args&&>(args)...);
}

// As above in clusters of `cluster` blocks, up to 8, which divides the grid (m3i/gpu/cluster.cuh).
template <class... Params, class... Args>
cudaError_t launch_cluster(void (*kernel)(Params...), dim3 grid, dim3 cluster, dim3 block,
                           size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return launch_config(config, kernel, static_cast<Args&&>(args)...);
}

}  // namespace m3i
