// Registers of a warp, as the wrappers in m3i/gpu/registers.cuh change their number.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

// Of each thread of the calling warp; waits until the block has them.
M3I_EMULATOR_API void set_max_registers(int count, bool increase);

}  // namespace m3i::emulator
