// views: Gaussian blur of a view, by one block. Device code only.
//
// Rows first, in fp32, then columns. A run of kRun rows is loaded as float with the pixels past
// both ends reflected, blurred across into a ring of 2 * radius + kRun rows, and the rows of the
// view whose neighbours are all in the ring are blurred down and written. So a view is read once
// and written once, and may be written where it stands, if all of its columns are done together.
//
// A thread sums kRun neighbours at once: along a row across, along a column down. Both slide over
// their values, so that a step by one weight loads two values for kRun sums.
#pragma once

#include "m3i/gpu/shared.cuh"
#include "views/sm80/block.cuh"

namespace m3i::views {

// What the block blurs, in shared memory: it is the same for all threads, and registers are few.
// The rest is at places of the dynamic shared memory.
struct Blur {
  const uint8_t* from;  // [3, S, S]
  uint8_t* to;          // [3, S, S]; `from` itself where blurs_in_place
  int size;             // S
  bool solarizes;
  int half, radius;
  BlurTiling tiling;
  int loaded_pitch;  // pixels of a loaded row
  int slots;         // of the ring
  int ring_place;

  __device__ double* exponentials() const { return dynamic_shared<double>(); }  // [half + 1]
  __device__ float* weights() const {  // [half + 1] from the centre
    return dynamic_shared<float>() + 2 * (half + 1);
  }
  __device__ float* loaded() const {  // [planes, kRun, loaded_pitch]
    return dynamic_shared<float>() + blur_weight_bytes(half) / 4;
  }
  __device__ float* ring() const {  // [planes, slots, columns]
    return dynamic_shared<float>() + ring_place;
  }
};

// Fills what depends on sigma: blur_weights of arithmetic.h, bit for bit, by the block, and the
// tiling for their radius. The rest is there already. Begins and ends with a barrier.
__device__ inline void plan_blur(Blur& of, float sigma, int shared_bytes) {
  __syncthreads();
  const double width = sigma;
  const double rate = div_rn(-0.5, mul_rn(width, width));
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int k = thread; k <= of.half; k += kThreads) {
    of.exponentials()[k] = exp_of(mul_rn(rate, static_cast<double>(k) * k));
  }
  __syncthreads();
  double sum = 1.0;  // in every thread: the loads are broadcasts
#pragma unroll 1
  for (int k = 1; k <= of.half; ++k) sum = add_rn(sum, 2.0 * of.exponentials()[k]);
  int radius = 0;
#pragma unroll 1
  for (int k = thread; k <= of.half; k += kThreads) {
    const double weight = div_rn(of.exponentials()[k], sum);
    of.weights()[k] = static_cast<float>(weight);
    if (weight >= kBlurLeast) radius = k;
  }
  radius = over_block(radius, [](int a, int b) { return max(a, b); });
  if (thread == 0) {
    const BlurTiling tiling = blur_tiling(of.size, of.half, radius, shared_bytes);
    of.radius = radius;
    of.tiling.columns = tiling.columns;
    of.tiling.planes = tiling.planes;
    of.loaded_pitch = tiling.columns + 2 * radius;
    of.slots = 2 * radius + kRun;
    of.ring_place = static_cast<int>(blur_weight_bytes(of.half) / 4) +
                    tiling.planes * kRun * (tiling.columns + 2 * radius);
  }
  __syncthreads();
}

// Sums of kRun neighbours; at(k) is the value k places after the first of them.
template <class At>
__device__ inline void blur_run(const Blur& of, float* sums, const At& at) {
  const float* weights = of.weights();
  float left[kRun], right[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    left[i] = right[i] = at(i);
    sums[i] = mul_rn(weights[0], left[i]);
  }
#pragma unroll 1
  for (int k = 1; k <= of.radius; ++k) {
#pragma unroll
    for (int i = kRun - 1; i > 0; --i) left[i] = left[i - 1];
    left[0] = at(-k);
#pragma unroll
    for (int i = 0; i + 1 < kRun; ++i) right[i] = right[i + 1];
    right[kRun - 1] = at(kRun - 1 + k);
    const float weight = weights[k];
#pragma unroll
    for (int i = 0; i < kRun; ++i) sums[i] = fma_rn(weight, add_rn(left[i], right[i]), sums[i]);
  }
}

// The place of a pixel, reflected; for one that lies further out, or past `last`, which are summed
// at the end of a run and not written, some place that can be read.
__device__ inline int inside(int at, int size, int last) {
  return min(max(reflected(at, size), 0), last);
}

// The kRun rows from `done` on, of which those past the last one repeat it: nobody reads them.
__device__ inline void load_rows(const Blur& of, int channel, int x, int done) {
  const int rows = of.tiling.planes * kRun, pitch = of.loaded_pitch;
  for (int row = warp_index(); row < rows; row += kWarps) {
    const int line = (channel + row / kRun) * of.size + min(done + row % kRun, of.size - 1);
    const uint8_t* from = of.from + line * of.size;
    for (int i = lane_index(); i < pitch; i += 32) {
      of.loaded()[row * pitch + i] = from[inside(x - of.radius + i, of.size, of.size - 1)];
    }
  }
}

__device__ inline void blur_across(const Blur& of, int done) {
  const int columns = of.tiling.columns, runs = columns / kRun;
  const Ring held(of.slots, max(done + kRun - of.slots, 0));
  for (int i = static_cast<int>(threadIdx.x); i < of.tiling.planes * kRun * runs; i += kThreads) {
    const int row = i / runs, run = i % runs * kRun;
    const float* centre = of.loaded() + row * of.loaded_pitch + of.radius + run;
    float sums[kRun];
    blur_run(of, sums, [&](int k) { return centre[k]; });
    const int slot = row / kRun * of.slots + held.slot(done + row % kRun);
    float* to = of.ring() + slot * columns + run;
#pragma unroll
    for (int k = 0; k < kRun; ++k) to[k] = sums[k];
  }
}

// Rows [begin, end) of the view, of which the ring has all neighbours: it holds kRun rows from
// `done` on, and those before.
__device__ inline void blur_down(const Blur& of, int channel, int x, int done, int begin, int end) {
  const int columns = of.tiling.columns, runs = (end - begin + kRun - 1) / kRun;
  const Ring held(of.slots, max(done + kRun - of.slots, 0));
  const int last = min(done + kRun, of.size) - 1;
  for (int i = static_cast<int>(threadIdx.x); i < of.tiling.planes * runs * columns;
       i += kThreads) {
    const int column = i % columns, first = begin + i / columns % runs * kRun;
    const int plane = i / columns / runs;
    if (x + column >= of.size) continue;
    const float* values = of.ring() + plane * of.slots * columns + column;
    float sums[kRun];
    blur_run(of, sums,
             [&](int k) { return values[held.slot(inside(first + k, of.size, last)) * columns]; });
    uint8_t* to = of.to + ((channel + plane) * of.size + first) * of.size + x + column;
#pragma unroll
    for (int k = 0; k < kRun; ++k, to += of.size) {
      if (first + k >= end) break;
      const float value = clamped(even_of(sums[k]), 255.0f);
      *to = static_cast<uint8_t>(of.solarizes ? solarized(value) : value);
    }
  }
}

__device__ inline void blur(const Blur& of) {
  for (int channel = 0; channel < kViewChannels; channel += of.tiling.planes) {
    for (int x = 0; x < of.size; x += of.tiling.columns) {
      int written = 0;  // rows of the view
      for (int done = 0; done < of.size; done += kRun) {
        load_rows(of, channel, x, done);
        __syncthreads();
        blur_across(of, done);
        __syncthreads();
        const int next = done + kRun;
        const int end = next >= of.size ? of.size : max(next - of.radius, 0);
        blur_down(of, channel, x, done, written, end);
        written = end;
      }
    }
  }
}

}  // namespace m3i::views
