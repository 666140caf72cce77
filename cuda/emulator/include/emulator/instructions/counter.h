// Counters in global memory, for the wrappers in m3i/gpu/counter.cuh.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

M3I_EMULATOR_API void counter_add_release(uint64_t* counter, uint64_t value);
M3I_EMULATOR_API uint64_t counter_load_acquire(uint64_t* counter);

}  // namespace m3i::emulator
