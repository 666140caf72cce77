// The number of a warp's registers, for the wrappers in m3i/gpu/registers.cuh.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

// Sets the number of each thread of the calling warp, after waiting until the block has them.
M3I_EMULATOR_API void set_max_registers(int count, bool increase);

}  // namespace m3i::emulator
