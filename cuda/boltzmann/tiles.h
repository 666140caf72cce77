// boltzmann: tiles. Made of tiles.json, which says why, by m3i_fast/ops/tiles.py.
#pragma once

#include "boltzmann/policy.h"
#include "m3i/types.h"

namespace m3i::boltzmann {

M3I_HOST_DEVICE constexpr Policy half_policy() { return {128, 3, 2, 2}; }
M3I_HOST_DEVICE constexpr Policy float_policy() { return {128, 3, 2, 2}; }
inline constexpr int kHopperStages = 4;
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
inline constexpr int kGradsMibA100 = 24;
inline constexpr int kGradsMibH100 = 32;
inline constexpr int64_t kCpuTileColumns = 768;
inline constexpr int64_t kCpuRunRows = 128;
inline constexpr int64_t kCpuLeastRuns = 8;

}  // namespace m3i::boltzmann
