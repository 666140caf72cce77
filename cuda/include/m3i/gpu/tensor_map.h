// The map of a matrix in global memory for tensor copies: its address and the box that one copy
// moves. For device and host; make_tensor_map.h makes one.
#pragma once

#include "m3i/gpu/swizzle.h"

namespace m3i {

// The driver's encoding, aligned as CUDA 13's CUtensorMap. Kernels take it as
// `const __grid_constant__ TensorMap`.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

}  // namespace m3i
