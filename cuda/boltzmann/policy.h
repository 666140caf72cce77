// boltzmann on CUDA: the fields that are tuned for each card (tiles.h).
#pragma once

namespace m3i::boltzmann {

// Policy of the kernels by mma.sync.
struct Policy {
  int side;    // rows and columns of a tile
  int stages;  // slices of its operands in shared memory
  int warps_down, warps_across;
};

}  // namespace m3i::boltzmann
