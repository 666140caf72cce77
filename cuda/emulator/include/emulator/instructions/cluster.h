// Clusters, for the wrappers in m3i/gpu/cluster.cuh.
#pragma once

#include "emulator/runtime.h"

namespace m3i::emulator {

M3I_EMULATOR_API uint32_t cluster_rank();
M3I_EMULATOR_API uint32_t cluster_size();
M3I_EMULATOR_API void cluster_arrive();
M3I_EMULATOR_API void cluster_wait();
M3I_EMULATOR_API void* map_shared_rank(const void* pointer, uint32_t rank);

}  // namespace m3i::emulator
