// views: what the phases of a view's block share. Device code only.
#pragma once

#include "m3i/numbers/vec.cuh"
#include "views/arithmetic.h"
#include "views/tiling.h"

namespace m3i::views {

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// Of all threads' values, in every thread. Joins in any order give the same bits here: sums of
// integers and largest values.
template <class T, class Join>
__device__ inline T over_block(T value, const Join& join) {
  __shared__ T parts[kWarps];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  __syncthreads();  // an earlier call's parts have been read
  if (lane_index() == 0) parts[warp_index()] = value;
  __syncthreads();
  value = parts[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) value = join(value, parts[i]);
  return value;
}

// The slot of a row that a ring of `slots` holds, where row `first` is the oldest that it may hold.
struct Ring {
  int slots, first, first_slot;

  __device__ Ring(int slots, int first) : slots(slots), first(first), first_slot(first % slots) {}

  __device__ int slot(int row) const {
    const int at = first_slot + row - first;
    return at < slots ? at : at - slots;
  }
};

// kPixels neighbours of a plane, which this kernel may have written: not through the read-only
// cache.
template <int kPixels>
__device__ inline Vec<uint8_t, kPixels> load_written(const uint8_t* from) {
  return *reinterpret_cast<const Vec<uint8_t, kPixels>*>(from);
}

}  // namespace m3i::views
