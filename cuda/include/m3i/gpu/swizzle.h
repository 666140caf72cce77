// The permutation of a tile's 16-byte pieces in shared memory by which a column of them is read
// without bank conflicts. For device and host.
#pragma once

#include "m3i/types.h"

namespace m3i {

// The values are those of a wgmma descriptor.
enum class Swizzle { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// Bytes of a row of the pattern, which has eight rows; 16 without a swizzle.
M3I_HOST_DEVICE constexpr uint32_t swizzle_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16u : 256u >> static_cast<uint32_t>(swizzle);
}

// The swizzled place of the byte at `offset` from a multiple of eight rows. Bits 4 to 6, as far as
// the row reaches, are xored with the three bits above them.
M3I_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  return offset ^ (offset >> 3 & (swizzle_bytes(swizzle) - 1) & ~15u);
}

}  // namespace m3i
