// A matrix in global memory as tensor copies see it: its place, and the box that one copy moves.
// For device and host; make_tensor_map.h makes one.
#pragma once

#include "m3i/gpu/swizzle.h"

namespace m3i {

// What the driver makes of it, aligned as CUDA 13's CUtensorMap. A kernel takes it as
// `const __grid_constant__ TensorMap`.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

}  // namespace m3i
