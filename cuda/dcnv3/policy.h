// dcnv3 on CUDA: the fields that are tuned for each card and size of call (tiles.h).
#pragma once

namespace m3i::dcnv3 {

struct Policy {
  int warps;               // of a block
  int blocks, bwd_blocks;  // least number on a multiprocessor, which bounds a thread's registers
  int slots;               // points that a warp keeps in shared memory
  int chunk;               // most points of a unit that a warp keeps at once
};

}  // namespace m3i::dcnv3
