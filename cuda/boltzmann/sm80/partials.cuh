// boltzmann: the sums that tiles leave behind, put together in a fixed order. Device code only.
//
// Every tile writes its sums to a place of its own, and one thread adds, or compares, those of a
// row or column in the order of the tiles: the same bits at every run, without atomics.
#pragma once

#include "boltzmann/tiling.h"
#include "m3i/numbers/fast_math.cuh"

namespace m3i::boltzmann {

inline constexpr int kReduceThreads = 256;

// How a tile's elements become one number of a row or column.
struct Sum {
  template <class A>
  __device__ static A none() {
    return 0;
  }
  template <class A>
  __device__ static A combine(A a, A b) {
    return a + b;
  }
};
struct Largest {
  template <class A>
  __device__ static A none() {
    return __uint_as_float(0xff800000u);  // minus infinity
  }
  template <class A>
  __device__ static A combine(A a, A b) {
    return larger(a, b);
  }
};

// to[kind, i] (+)= sum over tiles of from[tile, kind, i], for i < length.
struct Reduction {
  const void* from;  // [tiles, kinds, from_pitch] wide
  void* to;          // [kinds, to_pitch] wide, or null: nothing to do
  int64_t tiles, length, from_pitch, to_pitch;
  bool first;  // of its block: `to` is overwritten
};

// Grid: x over length, y over the kinds, z over the two reductions.
template <class A, class How>
__global__ void __launch_bounds__(kReduceThreads)
    boltzmann_reduce_kernel(const Reduction rows, const Reduction columns, const bool* run) {
  if (run && !*run) return;
  const Reduction& job = blockIdx.z == 0 ? rows : columns;
  const int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (!job.to || i >= job.length) return;
  const int64_t kinds = gridDim.y, kind = blockIdx.y;
  const A* from = static_cast<const A*>(job.from) + kind * job.from_pitch + i;
  A* to = static_cast<A*>(job.to) + kind * job.to_pitch + i;
  A total = job.first ? How::template none<A>() : *to;
#pragma unroll 4
  for (int64_t tile = 0; tile < job.tiles; ++tile) {
    total = How::combine(total, from[tile * kinds * job.from_pitch]);
  }
  *to = total;
}

// *to = *total (+)= sum of from[0..tiles), in float64. One block.
template <class From, class A>
__global__ void __launch_bounds__(kReduceThreads)
    boltzmann_total_kernel(const From* from, int64_t tiles, bool first, double* total, A* to,
                           const bool* run) {
  if (run && !*run) return;
  __shared__ double sums[kReduceThreads];
  const int thread = threadIdx.x;
  double sum = 0;
  for (int64_t tile = thread; tile < tiles; tile += kReduceThreads) sum += from[tile];
  sums[thread] = sum;
  for (int part = kReduceThreads / 2; part > 0; part /= 2) {
    __syncthreads();
    if (thread < part) sums[thread] += sums[thread + part];
  }
  if (thread > 0) return;
  *total = (first ? 0 : *total) + sums[0];
  *to = static_cast<A>(*total);
}

}  // namespace m3i::boltzmann
