// dcnv3, device code: the forward kernel.
#pragma once

#include "dcnv3/sm80/walk.cuh"

namespace m3i::dcnv3 {

// ---- Forward ------------------------------------------------------------------------------------

template <int kVector, class T, class A>
__device__ inline void add_corner(const T* from, A weight, A (&sum)[kVector]) {
  A values[kVector];
  widen(load<kVector>(from), values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum[i] += weight * values[i];
}

// Adds samples of `count` points to this lane's channels. `x` points to them, in pixel 0; `step`
// and `row` are elements from pixel to pixel and from row to row.
template <int kVector, class T, class A>
__device__ inline void add_samples(const Point<A>* points, const uint8_t* inside, int count,
                                   const T* x, int64_t step, int64_t row, A (&sum)[kVector]) {
#pragma unroll 3
  for (int k = 0; k < count; ++k) {
    const unsigned corners = inside[k];
    if (corners == 0) continue;
    const Point<A> point = points[k];
    const T* at = x + point.pixel * step;
    const CornerWeights<A> weights(point);
    if (corners == kAllCorners) {
      const auto top_left = load<kVector>(at), top_right = load<kVector>(at + step);
      const auto bottom_left = load<kVector>(at + row),
                 bottom_right = load<kVector>(at + row + step);
      A values[4][kVector];
      widen(top_left, values[0]);
      widen(top_right, values[1]);
      widen(bottom_left, values[2]);
      widen(bottom_right, values[3]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // in the same order as below and in nine.cuh
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += weights.at[c] * values[c][i];
      }
    } else {
      if (corners & kTopLeft) add_corner<kVector>(at, weights.at[0], sum);
      if (corners & kTopRight) add_corner<kVector>(at + step, weights.at[1], sum);
      if (corners & kBottomLeft) add_corner<kVector>(at + row, weights.at[2], sum);
      if (corners & kBottomRight) add_corner<kVector>(at + row + step, weights.at[3], sum);
    }
  }
}

// Grid: x over the blocks of an image, y over the images; both strided where they are too many.
template <class T, int kVector, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dcnv3_kernel(const Dcnv3Params params, const Tiling tiling) {
  using A = Accumulator<T>;
  const Dcnv3Shape& shape = params.shape;
  const Workspace<A> work =
      make_workspace<A>(dynamic_shared(), tiling, threadIdx.x / kWarpLanes, false);
  PointMaker<T> maker(shape, tiling, params.offset, params.mask, work);
  const int64_t step = pixel_step(shape, 1), row = shape.width * step;
  const int channels_a_pass = tiling.lanes * kVector;

  for_each_units<kThreads>(shape, tiling, [&](const Units& units) {
    maker.begin(units);
    const int64_t unit = units.first + units.own;
    const T* x =
        static_cast<const T*>(params.x) + group_begin(shape, units.image, group_of(shape, unit));
    T* out = static_cast<T*>(params.out) + out_begin(shape, units.image, unit);
    const int slot = units.own * tiling.pitch;
    for (int64_t pass = 0; pass < shape.group_size; pass += channels_a_pass) {
      const int64_t channel = pass + units.lane * kVector;
      const bool has_channels = units.exists && channel < shape.group_size;
      A sum[kVector] = {};
      for_each_chunk(shape, tiling, [&](int64_t first, int count) {
        if (pass == 0 || tiling.chunk < shape.points) maker.make(units, first, count);
        if (has_channels) {
          add_samples<kVector>(work.points + slot, work.inside + slot, count, x + channel, step,
                               row, sum);
        }
      });
      if (has_channels) store(out + channel, round_to<T>(sum));
    }
    __syncwarp();
  });
}

}  // namespace m3i::dcnv3
