// views: what the phases of a view's block share. Device code only.
#pragma once

#include "m3i/numbers/vec.cuh"
#include "views/arithmetic.h"
#include "views/params.h"
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

// ---- Layouts ------------------------------------------------------------------------------------
// Where the pixels of a view stand, in bytes from its first one: row(channel, y) + column(x). The
// pixels of a channel are also numbered, by address: pixel(i) is that of number i.

// [3, S, S].
struct Square {
  int size, area;  // S, S^2

  __device__ int height() const { return size; }
  __device__ int width() const { return size; }
  __device__ int pixels() const { return area; }
  __device__ int channel() const { return area; }  // from a channel to the next
  __device__ int row(int channel, int y) const { return (channel * size + y) * size; }
  __device__ int column(int x) const { return x; }
  __device__ int below(int) const { return size; }  // from a pixel of row y to the one below
  __device__ int pixel(int i) const { return i; }
};

// [rows * columns, 3, P, P]: patches row by row.
struct Patches {
  int size, area;  // P, P^2
  int rows, columns;

  __device__ int patch() const { return kViewChannels * area; }
  __device__ int height() const { return rows * size; }
  __device__ int width() const { return columns * size; }
  __device__ int pixels() const { return rows * columns * area; }
  __device__ int channel() const { return area; }
  __device__ int row(int channel, int y) const {
    return y / size * columns * patch() + channel * area + y % size * size;
  }
  __device__ int column(int x) const { return x / size * patch() + x % size; }
  __device__ int below(int y) const {
    return (y + 1) % size ? size : columns * patch() - (size - 1) * size;
  }
  __device__ int pixel(int i) const { return i / area * patch() + i % area; }
};

// kPixels neighbours of a plane, which this kernel may have written: not through the read-only
// cache.
template <int kPixels>
__device__ inline Vec<uint8_t, kPixels> load_written(const uint8_t* from) {
  return *reinterpret_cast<const Vec<uint8_t, kPixels>*>(from);
}

}  // namespace m3i::views
