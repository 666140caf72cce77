// The GPU that is emulated.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

inline constexpr size_t kSharedBytes = 48 * 1024;  // of a block, unless its kernel asks for more
// Of a block whose kernel asks for more by its attribute.
size_t most_shared_bytes();

bool has_clusters();
// Requires this compute capability; otherwise the running thread is reported for `what`.
void require_architecture(int compute_capability, const char* what, Site site);

// Selects the GPU by its compute capability, 80 (the default) or 90.
extern "C" M3I_EMULATOR_API void m3i_emulator_set_architecture(int compute_capability);

}  // namespace m3i::emulator
