// dcnv3, device code: the gradient by x where every run has to give the same bits.
//
// Sums of integers do not depend on their order. So contributions are added as 64-bit integers, in
// units of a power of two that is chosen so that no sum overflows: a sum has at most Ho Wo K terms,
// none larger than |grad_out| times |mask|. A unit is then 2^-62 of that bound: for 56 x 56 pixels
// and 9 points 2^-47 of the largest product, far below what float32 resolves. A term that is
// not finite cannot be an integer: it sets a bit of its element, which becomes NaN.
//
// Rejected: owners of pixels that scan the points in a fixed order read every point once a tile,
// which is quadratic in the image; sorting the points by pixel first takes a stable sort of
// N Ho Wo G K keys at every call.
#pragma once

#include "dcnv3/sm80/walk.cuh"

namespace m3i::dcnv3 {

// In global memory, zero at first.
struct FixedPoint {
  // Largest finite magnitudes: bits of a double, which are in the order of the numbers.
  unsigned long long* largest;  // [2] of grad_out and of mask
  unsigned long long* sums;     // [N, H, W, G, D] two's complement
  // The same, of what the rounding of a term to a unit left, in smaller units; float64 alone.
  unsigned long long* rests;
  uint32_t* not_finite;  // a bit an element
};

// A smaller unit: 2^-30 of a unit, so that 2^33 rests, each half a unit at most, do not overflow.
inline constexpr int kRestBits = 30;

template <class A>
__device__ inline bool is_finite(A value) {
  return value - value == 0;
}

// Grid: x, strided.
template <class T>
__global__ void __launch_bounds__(kLinearThreads)
    dcnv3_largest_kernel(const T* values, int64_t size, unsigned long long* largest) {
  double most = 0;
  const int64_t stride = int64_t{gridDim.x} * kLinearThreads;
  for (int64_t i = int64_t{blockIdx.x} * kLinearThreads + threadIdx.x; i < size; i += stride) {
    const double value = fabs(static_cast<double>(load_value(values + i)));
    if (is_finite(value)) most = fmax(most, value);
  }
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    most = fmax(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  if (threadIdx.x % kWarpLanes == 0) {
    atomicMax(largest, static_cast<unsigned long long>(__double_as_longlong(most)));
  }
}

// Exponent of the power of two that is the unit.
__device__ inline int unit_exponent(const Dcnv3Shape& shape, const FixedPoint& fixed) {
  const double grad = __longlong_as_double(static_cast<long long>(fixed.largest[0]));
  const double mask =
      shape.softmax ? 1.0 : __longlong_as_double(static_cast<long long>(fixed.largest[1]));
  if (grad == 0 || mask == 0) return 0;
  const double terms = static_cast<double>(shape.out_height * shape.out_width * shape.points);
  return ilogb(grad) + ilogb(mask) + ilogb(terms) + 3 - 62;
}

template <class A>
__device__ inline void add_fixed(const FixedPoint& fixed, int64_t at, A value, int exponent) {
  if (is_finite(value)) {
    const double scaled = ldexp(static_cast<double>(value), -exponent);
    const long long units = llrint(scaled);
    atomicAdd(fixed.sums + at, static_cast<unsigned long long>(units));
    if constexpr (sizeof(A) == sizeof(double)) {
      const double rest = ldexp(scaled - static_cast<double>(units), kRestBits);
      atomicAdd(fixed.rests + at, static_cast<unsigned long long>(llrint(rest)));
    }
  } else {
    atomicOr(fixed.not_finite + at / 32, 1u << (at % 32));
  }
}

// Grid: as the forward's, with one channel an access.
template <class T, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dcnv3_scatter_kernel(const Dcnv3BwdParams params, const FixedPoint fixed, const Tiling tiling) {
  using A = Accumulator<T>;
  const Dcnv3Shape& shape = params.shape;
  const Workspace<A> work =
      make_workspace<A>(dynamic_shared(), tiling, threadIdx.x / kWarpLanes, false);
  PointMaker<T> maker(shape, tiling, params.offset, params.mask, work);
  const int64_t step = pixel_step(shape, 1), row = shape.width * step;
  const int exponent = unit_exponent(shape, fixed);

  for_each_units<kThreads>(shape, tiling, [&](const Units& units) {
    maker.begin(units);
    const int64_t unit = units.first + units.own;
    const int64_t begin = group_begin(shape, units.image, group_of(shape, unit));
    const T* grad_out =
        static_cast<const T*>(params.grad_out) + out_begin(shape, units.image, unit);
    for_each_chunk(shape, tiling, [&](int64_t first, int count) {
      maker.make(units, first, count);
      for (int64_t c = units.lane; units.exists && c < shape.group_size; c += tiling.lanes) {
        const A grad = load_value(grad_out + c);
        for (int k = 0; k < count; ++k) {
          const int slot = units.own * tiling.pitch + k;
          const unsigned corners = work.inside[slot];
          const Point<A> point = work.points[slot];
          const A bottom = point.y * point.weight, top = (1 - point.y) * point.weight;
          const A right = point.x, left = 1 - right;
          const int64_t at = begin + point.pixel * step + c;
          if (corners & kTopLeft) add_fixed(fixed, at, top * left * grad, exponent);
          if (corners & kTopRight) add_fixed(fixed, at + step, top * right * grad, exponent);
          if (corners & kBottomLeft) add_fixed(fixed, at + row, bottom * left * grad, exponent);
          if (corners & kBottomRight) {
            add_fixed(fixed, at + row + step, bottom * right * grad, exponent);
          }
        }
      }
    });
    __syncwarp();
  });
}

// Sums to numbers; grid: x, strided.
template <class T>
__global__ void __launch_bounds__(kLinearThreads)
    dcnv3_sums_kernel(const Dcnv3Shape shape, const FixedPoint fixed, T* grad_x, int64_t size) {
  using A = Accumulator<T>;
  const int exponent = unit_exponent(shape, fixed);
  const int64_t stride = int64_t{gridDim.x} * kLinearThreads;
  for (int64_t i = int64_t{blockIdx.x} * kLinearThreads + threadIdx.x; i < size; i += stride) {
    const bool finite = !(fixed.not_finite[i / 32] >> (i % 32) & 1u);
    double sum = static_cast<double>(static_cast<long long>(fixed.sums[i]));
    if constexpr (sizeof(A) == sizeof(double)) {
      const auto rest = static_cast<long long>(fixed.rests[i]);
      sum += ldexp(static_cast<double>(rest), -kRestBits);
    }
    store_value(grad_x + i, static_cast<A>(finite ? ldexp(sum, exponent) : nan("")));
  }
}

}  // namespace m3i::dcnv3
