// dcnv3, device code: the backward kernel.
#pragma once

#include "dcnv3/sm80/scatter.cuh"

namespace m3i::dcnv3 {

// ---- Gradients by offset and mask ---------------------------------------------------------------

template <int kVector, class T, class A>
__device__ inline A dot(const T* from, const A (&grad)[kVector]) {
  A values[kVector];
  widen(load<kVector>(from), values);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += grad[i] * values[i];
  return sum;
}

// Of one point, summed over this lane's channels. `x` points to them, in pixel 0; `step` and `row`
// are elements from pixel to pixel and from row to row.
template <int kVector, class T, class A>
__device__ inline void differentiate(const Point<A>& point, unsigned corners, const T* x,
                                     int64_t step, int64_t row, const A (&grad)[kVector],
                                     A (&sums)[4]) {
  const T* at = x + point.pixel * step;
  A top_left = 0, top_right = 0, bottom_left = 0, bottom_right = 0;
  if (corners == kAllCorners) {  // without branches, so that all loads are under way at once
    top_left = dot<kVector>(at, grad);
    top_right = dot<kVector>(at + step, grad);
    bottom_left = dot<kVector>(at + row, grad);
    bottom_right = dot<kVector>(at + row + step, grad);
  } else {
    if (corners & kTopLeft) top_left = dot<kVector>(at, grad);
    if (corners & kTopRight) top_right = dot<kVector>(at + step, grad);
    if (corners & kBottomLeft) bottom_left = dot<kVector>(at + row, grad);
    if (corners & kBottomRight) bottom_right = dot<kVector>(at + row + step, grad);
  }
  const A right = point.x, left = 1 - right, bottom = point.y, top = 1 - bottom;
  sums[kByX] = top * (top_right - top_left) + bottom * (bottom_right - bottom_left);
  sums[kByY] = left * (bottom_left - top_left) + right * (bottom_right - top_right);
  sums[kByWeight] = top * (left * top_left + right * top_right) +
                    bottom * (left * bottom_left + right * bottom_right);
}

// Sums of four values over the lanes of a unit. While there are several values, lanes share them
// out as they add: lane 0 keeps the lower half in two steps, and so on. Two lanes end with two
// values each, more with one: 3 shuffles for 4 lanes instead of 8.
template <class A>
__device__ inline void sum_four(A (&values)[4], int lanes, int lane) {
  constexpr unsigned kAll = 0xffffffffu;
  if (lanes > 1) {
    const bool upper = lane & 1;
    const A first = upper ? values[0] : values[2], second = upper ? values[1] : values[3];
    values[0] = (upper ? values[2] : values[0]) + __shfl_xor_sync(kAll, first, 1);
    values[1] = (upper ? values[3] : values[1]) + __shfl_xor_sync(kAll, second, 1);
  }
  if (lanes > 2) {
    const bool upper = lane & 2;
    const A sent = upper ? values[0] : values[1];
    values[0] = (upper ? values[1] : values[0]) + __shfl_xor_sync(kAll, sent, 2);
  }
  for (int step = 4; step < lanes; step *= 2) values[0] += __shfl_xor_sync(kAll, values[0], step);
}

// What sum_four leaves in a lane: values [first, first + count).
struct Share {
  int first, count;

  __device__ Share(int lanes, int lane) {
    first = lanes == 1 ? 0 : (lane & 1) * 2 + (lane >> 1 & 1);
    count = lanes == 1 ? 4 : lanes == 2 ? 2 : 1;
    if (lane >= 4) count = 0;
  }
};

// ---- Kernel -------------------------------------------------------------------------------------

// One warp's units in the gradients by offset and mask.
template <class T, int kVector, class Units>
struct BwdUnits {
  using A = Accumulator<T>;

  const Dcnv3BwdParams& params;
  const Tiling& tiling;
  const Workspace<A>& work;
  const Units& units;

  // Gradients by the points of a chunk, of the channels from `pass` on; added to those of earlier
  // passes. All lanes come: those of a unit add up. Returns the sum of weight * kByWeight, in the
  // lane that has_weights().
  __device__ A differentiate_chunk(int64_t pass, int count) const {
    const Dcnv3Shape& shape = params.shape;
    const int64_t unit = units.index(units.own);
    const int64_t channel = pass + units.lane * kVector;
    const bool has_channels = units.exists && channel < shape.group_size;
    const int64_t at = group_begin(shape, units.image, group_of(shape, unit)) + channel;
    const int64_t step = pixel_step(shape, 1), row = shape.width * step;
    A grad[kVector] = {};
    if (has_channels) {
      const T* grad_out = static_cast<const T*>(params.grad_out);
      widen(load<kVector>(grad_out + out_begin(shape, units.image, unit) + channel), grad);
    }
    A total = 0;
    for (int k = 0; k < count; ++k) {
      const int slot = units.own * tiling.pitch + k;
      const unsigned corners = units.exists ? work.inside[slot] : 0;
      Point<A> point{};
      if (corners) point = work.points[slot];
      A sums[4] = {};
      if (corners && has_channels) {
        differentiate(point, corners, static_cast<const T*>(params.x) + at, step, row, grad, sums);
      }
      sum_four(sums, tiling.lanes, units.lane);
      total += point.weight * (tiling.lanes == 1 ? sums[kByWeight] : sums[0]);
      if (units.exists) add_to_grads(pass, slot, sums);
    }
    return total;
  }

  __device__ bool has_weights() const { return units.lane == (tiling.lanes > 1 ? 1 : 0); }

  // This lane's share of the sums.
  __device__ void add_to_grads(int64_t pass, int slot, const A (&sums)[4]) const {
    const Share share(tiling.lanes, units.lane);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (i >= share.count || share.first + i >= 3) continue;
      A& sum = work.grads[slot].sums[share.first + i];
      sum = pass > 0 ? sum + sums[i] : sums[i];
    }
  }

  // Writes the gradients by a chunk's offsets and masks, zeros where a point is not valid.
  __device__ void write_chunk(int64_t first, int count) const {
    const Dcnv3Shape& shape = params.shape;
    const A scale = static_cast<A>(shape.offset_scale);
    const int64_t begin = points_begin(shape, units.image, units.index(0));
    for_each_point(count, units, [&](int unit, int k) {
      const int slot = unit * tiling.pitch + k;
      const int64_t at = begin + units.past_first(unit) * shape.points + first + k;
      const A* sums = work.grads[slot].sums;
      const A weight = work.points[slot].weight;
      const bool valid = work.inside[slot] != 0;
      if (params.grad_offset) {
        T* to = static_cast<T*>(params.grad_offset) + 2 * at;
        store_value(to, valid ? sums[kByX] * weight * scale : A(0));
        store_value(to + 1, valid ? sums[kByY] * weight * scale : A(0));
      }
      if (params.grad_mask) {
        const A grad =
            shape.softmax ? weight * (sums[kByWeight] - work.totals[unit]) : sums[kByWeight];
        store_value(static_cast<T*>(params.grad_mask) + at, grad);
      }
    });
  }
};

// All gradients by a warp's units. `scatter` adds that by x.
//
// The softmax's gradient needs a sum over all points of a unit: where they are more than a chunk,
// a first sweep computes it.
template <class T, int kVector, class Units, class Scatter>
__device__ inline void differentiate_units(const Dcnv3BwdParams& params, const Tiling& tiling,
                                           const Workspace<Accumulator<T>>& work,
                                           PointMaker<T>& maker, const Units& units,
                                           const Scatter& scatter) {
  using A = Accumulator<T>;
  const Dcnv3Shape& shape = params.shape;
  const bool of_points = params.grad_offset || params.grad_mask;
  const bool needs_total = shape.softmax && params.grad_mask;
  const int num_sweeps = needs_total && tiling.chunk < shape.points ? 2 : 1;
  const BwdUnits<T, kVector, Units> bwd{params, tiling, work, units};
  const auto keep = [&](int slot, int x, int y, unsigned inside) {
    scatter.keep(slot, x, y, inside);
  };

  maker.begin(units);
  A total = 0;
  for (int sweep = num_sweeps - 1; sweep >= 0; --sweep) {
    for_each_chunk(shape, tiling, [&](int64_t first, int count) {
      maker.make(units, first, count, keep);
      if (of_points) {
        for (int64_t pass = 0; pass < shape.group_size; pass += tiling.lanes * kVector) {
          const A sum = bwd.differentiate_chunk(pass, count);
          if (sweep == num_sweeps - 1) total += sum;
        }
      }
      if (sweep > 0) return;
      scatter.add(units, count);
      if (of_points) {
        if (units.exists && bwd.has_weights()) work.totals[units.own] = total;
        __syncwarp();
        bwd.write_chunk(first, count);
      }
    });
  }
  __syncwarp();
}

// Grid: as the forward's. kByX: adds to `grad_x`; without it the compiler needs fewer registers.
// The others may be null.
template <class T, int kVector, int kThreads, int kBlocks, bool kByX>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dcnv3_bwd_kernel(const Dcnv3BwdParams params, [[maybe_unused]] Accumulator<T>* grad_x,
                     const Tiling tiling) {
  using A = Accumulator<T>;
  const Workspace<A> work =
      make_workspace<A>(dynamic_shared(), tiling, threadIdx.x / kWarpLanes, true);
  PointMaker<T> maker(params.shape, tiling, params.offset, params.mask, work);

  for_each_units<kThreads>(params.shape, tiling, [&](const Units& units) {
    if constexpr (kByX) {
      constexpr int kFloats = kVector > 1 && sizeof(A) == sizeof(float) ? kRedFloats : 1;
      const DirectScatter<T, kFloats> scatter{params, tiling, work, grad_x};
      differentiate_units<T, kVector>(params, tiling, work, maker, units, scatter);
    } else {
      differentiate_units<T, kVector>(params, tiling, work, maker, units, NoScatter{});
    }
  });
}

// ---- Rounding -----------------------------------------------------------------------------------

// to = from, rounded; grid: x over groups of kVector elements, strided. Both are aligned to 16
// bytes.
template <class T>
__global__ void __launch_bounds__(kLinearThreads)
    dcnv3_round_kernel(const float* from, T* to, int64_t size) {
  constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(T)), kPart = kVector / 2;
  const int64_t stride = int64_t{gridDim.x} * kLinearThreads;
  for (int64_t i = int64_t{blockIdx.x} * kLinearThreads + threadIdx.x; i * kVector < size;
       i += stride) {
    const int64_t at = i * kVector;
    if (at + kVector <= size) {
      const auto low = load<kPart>(from + at), high = load<kPart>(from + at + kPart);
      float values[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = j < kPart ? low.at[j] : high.at[j - kPart];
      store(to + at, round_to<T>(values));
    } else {
      for (int64_t j = at; j < size; ++j) store_value(to + j, from[j]);
    }
  }
}

}  // namespace m3i::dcnv3
