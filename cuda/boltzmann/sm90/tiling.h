// boltzmann by warpgroups (compute capability 9.0): supported calls and tiles; pure functions.
#pragma once

#include "boltzmann/tiling.h"

namespace m3i::boltzmann {

// A tile of two blocks, a cluster, one above the other. A row of `depth` terms has 128 bytes, the
// widest that a tensor copy swizzles.
inline constexpr Tile kHopperTile{256, 256, 64, kHopperStages, 16, 1};
inline constexpr int kClusterBlocks = 2;
inline constexpr int kBlockRows = kHopperTile.rows / kClusterBlocks;
inline constexpr int kBoxSide = 64;  // rows and columns of the box of one tensor copy

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumers = 2;  // warpgroups that multiply half of a block's rows each
inline constexpr int kHalfRows = kBlockRows / kConsumers;
inline constexpr int kHalves = kClusterBlocks * kConsumers;  // of both blocks
inline constexpr int kHopperThreads = (kConsumers + 1) * kWarpgroupThreads;

// Registers of a thread; the block has 65,536.
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroupThreads <= 65536,
              "cuda/boltzmann/tiles.json: more registers than a multiprocessor has");

// Conditions of wgmma, here of 16-bit types, and of tensor copies, whose rows begin at multiples of
// 16 bytes. `starts` is the bitwise or of the features' addresses. wgmma exists on compute
// capability 9.0 only.
M3I_HOST_DEVICE constexpr bool takes_warpgroups(int architecture, DType dtype, int64_t rows,
                                                int64_t columns, int64_t width, uint64_t starts) {
  return architecture == 90 && bytes_of(dtype) == 2 && rows > 0 && columns > 0 && width > 0 &&
         width * 2 % 16 == 0 && starts % 16 == 0;
}

// Number of clusters that divide so many tiles: as many as run at once, one block a multiprocessor.
M3I_HOST_DEVICE constexpr int64_t persistent_clusters(int64_t tiles, int64_t multiprocessors) {
  const int64_t at_once = multiprocessors / kClusterBlocks;
  return tiles < at_once ? tiles : at_once;
}

M3I_HOST_DEVICE constexpr Block make_hopper_block(const Blocks& blocks, int64_t rows,
                                                  int64_t columns, int64_t down, int64_t across) {
  constexpr Tile kTile = kHopperTile;  // which device code may not refer to
  return make_block(blocks, kTile, rows, columns, down, across);
}

// Where a cluster adds its sums up. A quarter of a patch's rows has a line of its own.
M3I_HOST_DEVICE constexpr Blocks make_hopper_patches(int64_t rows, int64_t columns) {
  constexpr Tile kTile = kHopperTile;
  return make_patches(rows, columns, kTile, kPatches);
}

}  // namespace m3i::boltzmann
