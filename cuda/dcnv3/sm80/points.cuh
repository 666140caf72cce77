// dcnv3, device code: where points sample, with what weights, once for all lanes of a unit.
#pragma once

#include "dcnv3/tiling.h"
#include "m3i/numbers/fast_math.cuh"
#include "m3i/numbers/vec.cuh"

namespace m3i::dcnv3 {

// Pixels; no padded image is as large. An offset of as much is never valid.
inline constexpr int kFar = 1 << 29;

inline constexpr unsigned kTopLeft = 1, kTopRight = 2, kBottomLeft = 4, kBottomRight = 8;
inline constexpr unsigned kAllCorners = 15;

// ---- What is in shared memory -------------------------------------------------------------------

// From a unit's base to a point that has no offset: whole pixels, and the rest in [0, 1).
template <class A>
struct Step {
  int x, y;
  A x_fraction, y_fraction;
};

template <class A>
struct Origin {
  int x, y;                // base of the unit's pixel, in pixels of x
  A largest, inverse_sum;  // softmax: weight = exp(logit - largest) * inverse_sum
};

template <class A>
struct alignas(4 * sizeof(A)) Point {
  A x, y;         // lx, ly in [0, 1)
  A weight;       // mask, after the softmax if any
  int32_t pixel;  // y0 * W + x0 of the upper left corner, which may lie outside
};

// Of a point, summed over channels.
inline constexpr int kByX = 0, kByY = 1;  // the sample's derivative by the place
inline constexpr int kByWeight = 2;       // the sample
template <class A>
struct PointGrads {
  A sums[3];
};

// The weights of a point's corners, in the order of their bits, with its mask.
template <class A>
struct CornerWeights {
  A at[4];

  __device__ explicit CornerWeights(const Point<A>& point)
      : CornerWeights(point.x, point.y, point.weight) {}
  __device__ CornerWeights(A right, A bottom, A mask) {
    const A lower = bottom * mask, upper = fused(-bottom, mask, mask);
    at[0] = fused(-right, upper, upper);
    at[1] = right * upper;
    at[2] = fused(-right, lower, lower);
    at[3] = right * lower;
  }
};

// What a warp owns, and the block's steps.
template <class A>
struct Workspace {
  Step<A>* steps;        // [chunk] of the block
  Point<A>* points;      // [units, pitch]
  PointGrads<A>* grads;  // [units, pitch] in the backward
  Origin<A>* origins;    // [units]
  A* totals;             // [units] in the backward
  uint8_t* inside;       // [units, pitch] the corners that lie in the image; 0: not valid
};

M3I_HOST_DEVICE constexpr int round_up(int bytes) { return (bytes + 31) / 32 * 32; }

template <class A>
M3I_HOST_DEVICE constexpr int warp_bytes(const Tiling& tiling, bool backward) {
  const int slots = tiling.units * tiling.pitch;
  const int slot_bytes = sizeof(Point<A>) + (backward ? sizeof(PointGrads<A>) : 0) + 1;
  const int unit_bytes = sizeof(Origin<A>) + (backward ? sizeof(A) : 0);
  return round_up(slots * slot_bytes + tiling.units * unit_bytes);
}

template <class A>
M3I_HOST_DEVICE constexpr int block_bytes(const Tiling& tiling, int warps, bool backward) {
  return round_up(tiling.chunk * static_cast<int>(sizeof(Step<A>))) +
         warps * warp_bytes<A>(tiling, backward);
}

// Widest alignment first.
template <class A>
__device__ inline Workspace<A> make_workspace(unsigned char* memory, const Tiling& tiling, int warp,
                                              bool backward) {
  const int slots = tiling.units * tiling.pitch;
  Workspace<A> work;
  work.steps = reinterpret_cast<Step<A>*>(memory);
  memory += round_up(tiling.chunk * static_cast<int>(sizeof(Step<A>)));
  memory += warp * warp_bytes<A>(tiling, backward);
  work.points = reinterpret_cast<Point<A>*>(memory);
  work.origins = reinterpret_cast<Origin<A>*>(work.points + slots);
  work.grads = reinterpret_cast<PointGrads<A>*>(work.origins + tiling.units);
  work.totals = reinterpret_cast<A*>(work.grads + (backward ? slots : 0));
  work.inside = reinterpret_cast<uint8_t*>(work.totals + (backward ? tiling.units : 0));
  return work;
}

// ---- Arithmetic of either width -----------------------------------------------------------------

__device__ inline float floor_of(float value) { return floorf(value); }
__device__ inline double floor_of(double value) { return floor(value); }
__device__ inline float exp_of(float value) { return expf(value); }
__device__ inline double exp_of(double value) { return exp(value); }
__device__ inline float max_of(float a, float b) { return fmaxf(a, b); }
__device__ inline double max_of(double a, double b) { return fmax(a, b); }

// Rounded, where fusing it with a later addition would change which pixel a point falls on.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

// Sum over the lanes of a unit, in all of them.
template <class A>
__device__ inline A sum_over_lanes(A value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// a / b, a >= 0, b > 0. Nearly always both fit 32 bits, which are divided in line; the compiler's
// own division of 64 bits is a subroutine.
M3I_HOST_DEVICE inline int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  int64_t result = 0, rest = 0;
  for (int bit = 62; bit >= 0; --bit) {
    rest = rest << 1 | (a >> bit & 1);
    if (rest >= b) {
      rest -= b;
      result |= int64_t{1} << bit;
    }
  }
  return result;
}

// ---- Geometry -----------------------------------------------------------------------------------

M3I_HOST_DEVICE inline int64_t centre(int64_t kernel, int64_t dilation) {
  return dilation * (kernel - 1) / 2;
}

// In double, once a block: a fraction is as exact as its type.
template <class A>
M3I_HOST_DEVICE inline void split_step(int64_t distance, double scale, int& whole, A& fraction) {
  const double scaled = static_cast<double>(distance) * scale;
  const double below = floor(scaled);
  const bool reachable = below > -2.0 * kFar && below < 2.0 * kFar;
  whole = reachable ? static_cast<int>(below) : 0;
  // A negative fraction is never valid.
  fraction = reachable ? static_cast<A>(scaled - below) : static_cast<A>(-2);
}

template <class A>
M3I_HOST_DEVICE inline Step<A> make_step(const Dcnv3Shape& shape, int64_t k) {
  const int64_t middle = shape.kernel_width / 2 * shape.kernel_height + shape.kernel_height / 2;
  if (shape.remove_center && k >= middle) ++k;
  const int64_t column = quotient(k, shape.kernel_height), row = k - column * shape.kernel_height;
  Step<A> step;
  split_step(column * shape.dilation_width - centre(shape.kernel_width, shape.dilation_width),
             shape.offset_scale, step.x, step.x_fraction);
  split_step(row * shape.dilation_height - centre(shape.kernel_height, shape.dilation_height),
             shape.offset_scale, step.y, step.y_fraction);
  return step;
}

__device__ inline int64_t group_of(const Dcnv3Shape& shape, int64_t unit) {
  return unit - quotient(unit, shape.groups) * shape.groups;
}

// Without the softmax.
template <class A>
__device__ inline Origin<A> make_origin(const Dcnv3Shape& shape, int64_t unit) {
  const int64_t pixel = quotient(unit, shape.groups);
  const int64_t row = quotient(pixel, shape.out_width);
  const int64_t column = pixel - row * shape.out_width;
  Origin<A> origin{};
  origin.x = static_cast<int>(column * shape.stride_width - shape.pad_width +
                              centre(shape.kernel_width, shape.dilation_width));
  origin.y = static_cast<int>(row * shape.stride_height - shape.pad_height +
                              centre(shape.kernel_height, shape.dilation_height));
  return origin;
}

// offset * scale, and NaN where the offset is infinite: a product that overflows is just far.
template <class A>
__device__ inline A stretched(A offset, A scale) {
  return product(offset, scale) + offset * 0;
}

// One coordinate: whole + fraction, valid where -1 < it < extent. The offset is split before
// anything is added, and tested before it becomes an integer: NaN is not near, and is the fraction.
// Where an offset is below a whole number by less than float32 can tell, the fraction is 1 and not
// the next pixel's 0: the derivative is the left side's, as the CPU's kernels and float64 have it.
template <class A>
__device__ inline bool place(A offset, int base, int extent, int step, A step_fraction, int& whole,
                             A& fraction) {
  const bool near = offset > -kFar && offset < kFar;
  const A below = near ? floor_of(offset) : A(0);
  fraction = offset - below + step_fraction;
  const bool carry = fraction >= 1 && step_fraction > 0;
  fraction -= carry ? A(1) : A(0);  // a branch takes more registers
  whole = static_cast<int>(below) + step + base + carry;
  return near && fraction >= 0 && whole < extent && (whole >= 0 || (whole == -1 && fraction > 0));
}

// Place of a point, without its weight, its upper left corner (x, y), and the corners that lie
// inside; none if it is not valid.
template <class A>
__device__ inline unsigned locate(const Dcnv3Shape& shape, const Origin<A>& origin,
                                  const Step<A>& step, A offset_x, A offset_y, Point<A>& point,
                                  int& x, int& y) {
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const A scale = static_cast<A>(shape.offset_scale);
  const bool valid_x =
      place(stretched(offset_x, scale), origin.x, width, step.x, step.x_fraction, x, point.x);
  const bool valid_y =
      place(stretched(offset_y, scale), origin.y, height, step.y, step.y_fraction, y, point.y);
  const bool valid = valid_x && valid_y;
  point.pixel = valid ? y * width + x : 0;
  const unsigned columns =
      (x >= 0 ? kTopLeft | kBottomLeft : 0) | (x < width - 1 ? kTopRight | kBottomRight : 0);
  const unsigned rows =
      (y >= 0 ? kTopLeft | kTopRight : 0) | (y < height - 1 ? kBottomLeft | kBottomRight : 0);
  return valid ? columns & rows : 0;
}

// ---- A warp's part ------------------------------------------------------------------------------

// The softmax of a unit's logits, by all of its lanes; a unit that does not exist has none.
template <class T, class A>
__device__ inline void normalise(const T* logits, int64_t num_points, bool exists, int lane,
                                 int lanes, Origin<A>& origin) {
  A largest = exists ? load_value(logits) : A(0);
  if (exists) {
    for (int64_t k = lane; k < num_points; k += lanes) {
      largest = max_of(largest, load_value(logits + k));
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    largest = max_of(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  A sum = 0;
  if (exists) {
    for (int64_t k = lane; k < num_points; k += lanes) {
      sum += exp_of(load_value(logits + k) - largest);
    }
  }
  origin.largest = largest;
  origin.inverse_sum = 1 / sum_over_lanes(sum, lanes);
}

// body(unit, k) for all of `count` points of the warp's units, each in one lane: neighbouring lanes
// have neighbouring points.
template <class Units, class Body>
__device__ inline void for_each_point(int count, const Units& units, const Body& body) {
  const int lane = threadIdx.x % kWarpLanes;
  int unit = lane / count, k = lane % count;
  const int units_a_step = kWarpLanes / count, rest = kWarpLanes % count;
  while (unit < units.count) {
    if (units.has(unit)) body(unit, k);
    unit += units_a_step;
    k += rest;
    if (k >= count) {
      k -= count;
      ++unit;
    }
  }
}

// A point without a place, or outside with a weight that is no number: NaN at the first pixel, so
// that no sum of them is finite. Its corners; an image without pixels has none.
template <class A>
__device__ inline unsigned keep_if_lost(const Dcnv3Shape& shape, Point<A>& point) {
  if (point.x == point.x && point.y == point.y && point.weight * 0 == 0) return 0;
  // In 32 bits, which an extent fits: compared in 64, they cost a step of registers.
  if (static_cast<int>(shape.height) == 0 || static_cast<int>(shape.width) == 0) return 0;
  point.x = point.y = point.weight = static_cast<A>(nan(""));
  return kTopLeft;
}

// Points [first, first + count) of the warp's units. `offset` and `mask` begin at its first unit.
template <class T, class A, class Units, class Keep>
__device__ inline void make_points(const Dcnv3Shape& shape, const Tiling& tiling, const T* offset,
                                   const T* mask, int64_t first, int count, const Units& units,
                                   const Workspace<A>& work, const Keep& keep) {
  for_each_point(count, units, [&](int unit, int k) {
    const int64_t at = units.past_first(unit) * shape.points + first + k;
    const Origin<A> origin = work.origins[unit];
    Point<A> point;
    int x, y;
    unsigned inside = locate(shape, origin, work.steps[k], load_value(offset + 2 * at),
                             load_value(offset + 2 * at + 1), point, x, y);
    keep(unit * tiling.pitch + k, x, y, inside);
    const A value = load_value(mask + at);
    point.weight = shape.softmax ? exp_of(value - origin.largest) * origin.inverse_sum : value;
    if (inside == 0) inside = keep_if_lost(shape, point);
    work.points[unit * tiling.pitch + k] = point;
    work.inside[unit * tiling.pitch + k] = static_cast<uint8_t>(inside);
  });
}

}  // namespace m3i::dcnv3
