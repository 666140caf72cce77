// dcnv3, device code: the sum of the gradient by x, from points in shared memory.
//
// Whatever lanes made a point, those that add it hold neighbouring channels, so that an instruction
// of a warp covers whole sectors of 32 bytes: a channel a lane, or four where one instruction adds
// four (red.cuh). They read grad_out once more, from the first-level cache.
#pragma once

#include "dcnv3/sm80/walk.cuh"
#include "m3i/gpu/red.cuh"

namespace m3i::dcnv3 {

// Adds a point to global memory. `at` is this lane's channels in its upper left pixel; `step` and
// `row` are elements from pixel to pixel and from row to row.
template <int kFloats, class A>
__device__ inline void scatter_point(const Point<A>& point, unsigned corners, A* at, int64_t step,
                                     int64_t row, const A (&grad)[kFloats]) {
  const CornerWeights<A> weights(point);
  const auto add = [&](A* to, A weight) {
    A values[kFloats];
#pragma unroll
    for (int i = 0; i < kFloats; ++i) values[i] = weight * grad[i];
    red_add(to, values);
  };
  if (corners & kTopLeft) add(at, weights.at[0]);
  if (corners & kTopRight) add(at + step, weights.at[1]);
  if (corners & kBottomLeft) add(at + row, weights.at[2]);
  if (corners & kBottomRight) add(at + row + step, weights.at[3]);
}

// Adds none.
struct NoScatter {
  __device__ void keep(int, int, int, unsigned) const {}
  template <class Units>
  __device__ void add(const Units&, int) const {}
};

// Adds all points to global memory. kFloats channels a lane, which divide a group's.
template <class T, int kFloats>
struct DirectScatter {
  using A = Accumulator<T>;

  const Dcnv3BwdParams& params;
  const Tiling& tiling;
  const Workspace<A>& work;
  A* grad_x;  // [N, H, W, G, D]

  __device__ void keep(int, int, int, unsigned) const {}

  // The first `count` points of each unit that is in shared memory.
  __device__ void add(const Units& units, int count) const {
    const Dcnv3Shape& shape = params.shape;
    const int64_t step = pixel_step(shape, 1), row = shape.width * step;
    int lanes = 1;  // of a unit
    while (lanes < kWarpLanes && int64_t{lanes} * kFloats < shape.group_size) lanes *= 2;
    const int lane = threadIdx.x % kWarpLanes;
    for (int unit = lane / lanes; unit < units.count; unit += kWarpLanes / lanes) {
      const int64_t index = units.index(unit);
      const T* grad_out =
          static_cast<const T*>(params.grad_out) + out_begin(shape, units.image, index);
      A* to = grad_x + group_begin(shape, units.image, group_of(shape, index));
      for (int64_t c = lane % lanes * kFloats; c < shape.group_size; c += lanes * kFloats) {
        A grad[kFloats];
        widen(load<kFloats>(grad_out + c), grad);
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          const int slot = unit * tiling.pitch + k;
          const unsigned corners = work.inside[slot];
          if (corners == 0) continue;
          const Point<A> point = work.points[slot];
          scatter_point(point, corners, to + c + point.pixel * step, step, row, grad);
        }
      }
    }
  }
};

}  // namespace m3i::dcnv3
