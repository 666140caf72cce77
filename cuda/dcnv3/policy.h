// dcnv3 on CUDA: what is tuned for each card and size of call (tiles.h).
#pragma once

namespace m3i::dcnv3 {

struct Policy {
  int warps;               // of a block
  int blocks, bwd_blocks;  // on a multiprocessor at least: the registers that a thread may have
  int slots;               // points that a warp holds in shared memory
  int chunk;               // points of a unit that a warp holds at once, at most
};

}  // namespace m3i::dcnv3
