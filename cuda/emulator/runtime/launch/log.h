// The launches that were asked for, to hold them against those of another runtime.
#pragma once

#include "cuda_runtime_api.h"

namespace m3i::emulator {

// Adds a launch to the log, if there is one: also one that is then refused.
void log_launch(const cudaLaunchConfig_t& config, const void* kernel, dim3 cluster);

// From now on each launch is a line of JSON at the end of this file: `name`, `grid`,
// `block`, `shared` (dynamic, bytes) and, of more than one block, `cluster` (blocks). Null: none
// is.
extern "C" M3I_EMULATOR_API void m3i_emulator_log_launches(const char* file);

// From now on launches are checked and logged, but not run: to count those of large problems.
extern "C" M3I_EMULATOR_API void m3i_emulator_skip_launches(bool skip);
bool skips_launches();

}  // namespace m3i::emulator
