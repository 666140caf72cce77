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
template <class Layout>
struct Blur {
  const uint8_t* from;
  uint8_t* to;    // `from` itself where blurs_in_place
  Layout layout;  // of both
  bool solarizes;
  float sigma;
  int half;          // of the kernel
  int shared_bytes;  // that the block has
  // What plan_blur fills in:
  int radius;
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
template <class Layout>
__device__ inline void plan_blur(Blur<Layout>& of) {
  __syncthreads();
  const double width = of.sigma;
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
    const BlurTiling tiling = blur_tiling(of.layout.width(), of.half, radius, of.shared_bytes);
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
template <class Layout, class At>
__device__ inline void blur_run(const Blur<Layout>& of, float* sums, const At& at) {
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
template <class Layout>
__device__ inline void load_rows(const Blur<Layout>& of, int channel, int x, int done) {
  const Layout& layout = of.layout;
  const int rows = of.tiling.planes * kRun, pitch = of.loaded_pitch;
  for (int row = warp_index(); row < rows; row += kWarps) {
    const int y = min(done + row % kRun, layout.height() - 1);
    const uint8_t* from = of.from + layout.row(channel + row / kRun, y);
    for (int i = lane_index(); i < pitch; i += 32) {
      const int column = inside(x - of.radius + i, layout.width(), layout.width() - 1);
      of.loaded()[row * pitch + i] = from[layout.column(column)];
    }
  }
}

template <class Layout>
__device__ inline void blur_across(const Blur<Layout>& of, int done) {
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
template <class Layout>
__device__ inline void blur_down(const Blur<Layout>& of, int channel, int x, int done, int begin,
                                 int end) {
  const Layout& layout = of.layout;
  const int columns = of.tiling.columns, runs = (end - begin + kRun - 1) / kRun;
  const Ring held(of.slots, max(done + kRun - of.slots, 0));
  const int last = min(done + kRun, layout.height()) - 1;
  for (int i = static_cast<int>(threadIdx.x); i < of.tiling.planes * runs * columns;
       i += kThreads) {
    const int column = i % columns, first = begin + i / columns % runs * kRun;
    const int plane = i / columns / runs;
    if (x + column >= layout.width()) continue;
    const float* values = of.ring() + plane * of.slots * columns + column;
    float sums[kRun];
    blur_run(of, sums, [&](int k) {
      return values[held.slot(inside(first + k, layout.height(), last)) * columns];
    });
    uint8_t* to = of.to + layout.row(channel + plane, first) + layout.column(x + column);
#pragma unroll
    for (int k = 0; k < kRun; to += layout.below(first + k), ++k) {
      if (first + k >= end) break;
      const float value = clamped(even_of(sums[k]), 255.0f);
      *to = static_cast<uint8_t>(of.solarizes ? solarized(value) : value);
    }
  }
}

template <class Layout>
__device__ inline void blur(const Blur<Layout>& of) {
  for (int channel = 0; channel < kViewChannels; channel += of.tiling.planes) {
    for (int x = 0; x < of.layout.width(); x += of.tiling.columns) {
      int written = 0;  // rows of the view
      for (int done = 0; done < of.layout.height(); done += kRun) {
        load_rows(of, channel, x, done);
        __syncthreads();
        blur_across(of, done);
        __syncthreads();
        const int next = done + kRun;
        const int height = of.layout.height();
        const int end = next >= height ? height : max(next - of.radius, 0);
        blur_down(of, channel, x, done, written, end);
        written = end;
      }
    }
  }
}

}  // namespace m3i::views
