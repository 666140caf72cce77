// dcnv3, device code: the forward of nine points and groups of 16 or 32 channels, as the models'
// layers have.
//
// The same work as the general kernel's (fwd.cuh), and the same sums in the same order, in half of
// the instructions: tests/cuda/dcnv3/test_instructions.py counts them. Lanes, points and passes are
// known to the compiler, so that nothing is looped over; places are 32-bit offsets within an image.
// A point is made once, by one lane of its unit, into four offsets and four weights. One whose
// corners are all inside takes no branch; others are made again by a loop, where a corner outside
// is replaced by the one beside it, without a weight: what is read counts anyway. A block goes
// through images: its units are at the same place of each.
#pragma once

#include "dcnv3/sm80/points.cuh"
#include "m3i/gpu/registers.cuh"
#include "m3i/gpu/shared.cuh"
#include "m3i/numbers/fast_math.cuh"

namespace m3i::dcnv3 {

// The numbers of a call that threads need, made once on the host.
struct NineShape {
  int64_t image_size;                   // elements of x
  int64_t mask_step, x_step, out_step;  // elements to a block's next image
  int batch;
  uint32_t size;      // bytes of an element
  int blocks, units;  // of an image
  int height, width, out_width, groups;
  uint32_t last_row, last_column;          // of x
  int channels, row;                       // elements from pixel to pixel and row to row of x
  int base_x, base_y, stride_x, stride_y;  // of a unit's pixel in x
  float scale;
  bool softmax;
  Divisor by_groups, by_width;
  int step_x[kNinePoints], step_y[kNinePoints];  // of a point without an offset
};

#ifndef __CUDACC_RTC__
// `rows`: of the grid.
inline NineShape make_nine_shape(const Dcnv3Shape& shape, int block_units, int64_t rows) {
  NineShape nine{};
  nine.batch = static_cast<int>(shape.batch);
  nine.units = static_cast<int>(units_per_image(shape));
  nine.blocks = static_cast<int>(divide_up(nine.units, block_units));
  nine.height = static_cast<int>(shape.height);
  nine.width = static_cast<int>(shape.width);
  nine.last_row = static_cast<uint32_t>(shape.height - 1);
  nine.last_column = static_cast<uint32_t>(shape.width - 1);
  nine.out_width = static_cast<int>(shape.out_width);
  nine.groups = static_cast<int>(shape.groups);
  nine.channels = static_cast<int>(shape.groups * shape.group_size);
  nine.row = nine.width * nine.channels;
  nine.image_size = int64_t{nine.height} * nine.row;
  nine.mask_step = rows * units_per_image(shape) * kNinePoints;
  nine.x_step = rows * nine.image_size;
  nine.out_step = rows * units_per_image(shape) * shape.group_size;
  nine.base_x =
      static_cast<int>(centre(shape.kernel_width, shape.dilation_width) - shape.pad_width);
  nine.base_y =
      static_cast<int>(centre(shape.kernel_height, shape.dilation_height) - shape.pad_height);
  nine.stride_x = static_cast<int>(shape.stride_width);
  nine.stride_y = static_cast<int>(shape.stride_height);
  nine.scale = static_cast<float>(shape.offset_scale);
  nine.softmax = shape.softmax;
  nine.by_groups = Divisor::of(static_cast<uint32_t>(shape.groups));
  nine.by_width = Divisor::of(static_cast<uint32_t>(shape.out_width));
  for (int k = 0; k < kNinePoints; ++k) {
    const Step<float> step = make_step<float>(shape, k);
    nine.step_x[k] = step.x;
    nine.step_y[k] = step.y;
  }
  return nine;
}
#endif

// What is known at compile time.
template <class T, int kGroupSize>
struct NineLayout {
  static constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kGroupSize / kVector;                 // of a unit
  static constexpr int kUnits = kWarpLanes / kLanes;                  // of a warp
  static constexpr int kTrips = (kNinePoints + kLanes - 1) / kLanes;  // points of a lane
  static constexpr int kPitch = kTrips * kLanes | 1;                  // slots of a unit
  static constexpr int kSlotBytes = 2 * 4 * static_cast<int>(sizeof(float));
  static constexpr int kWarpBytes = kUnits * kPitch * kSlotBytes;
};

__device__ inline float4 as_float4(const CornerWeights<float>& weights) {
  return make_float4(weights.at[0], weights.at[1], weights.at[2], weights.at[3]);
}

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr uint32_t kNotValid = 0xffffffffu;

// Makes a unit's points, all of its lanes together.
template <class T, int kGroupSize>
class NineMaker {
  using Layout = NineLayout<T, kGroupSize>;
  static constexpr int kLanes = Layout::kLanes, kTrips = Layout::kTrips;

 public:
  // `at` and `weights`: the unit's slots; (x, y): its pixel.
  __device__ NineMaker(const Dcnv3Params& params, const NineShape& shape, int x, int y, int lane,
                       uint4* at, float4* weights)
      : params(params), shape(shape), base_x(x), base_y(y), lane(lane), at(at), weights(weights) {
    has_last = lane + (kTrips - 1) * kLanes < kNinePoints;

#pragma unroll
    for (int t = 0; t < kTrips; ++t) {
      const int k = t < kTrips - 1 || has_last ? lane + t * kLanes : lane;
      first_x[t] = x + shape.step_x[k];
      first_y[t] = y + shape.step_y[k];
    }
  }

  // From the offsets and mask of the lane's first point. Returns whether all of them are valid.
  __device__ bool make(const T* offset, const T* mask) {
    Vec<T, 2> pairs[kTrips] = {};
    float masks[kTrips];
    masks[kTrips - 1] = __uint_as_float(0xff800000u);  // -infinity: no weight in a softmax
#pragma unroll
    for (int t = 0; t < kTrips; ++t) {
      if (t == kTrips - 1 && !has_last) break;
      pairs[t] = load<2>(offset + 2 * t * kLanes);
      masks[t] = load_value(mask + t * kLanes);
    }
    if (shape.softmax) normalise(masks);
    unsigned edge = 0;  // points that have not all corners inside
#pragma unroll
    for (int t = 0; t < kTrips; ++t) {
      float offsets[2];
      widen(pairs[t], offsets);
      edge |= make_inside(t, offsets, masks[t]) ? 0u : 1u << t;
    }
    bool all = true;
    while (edge) {
      const int past = (__ffs(static_cast<int>(edge)) - 1) * kLanes;
      edge &= edge - 1;
      if (lane + past < kNinePoints) {
        all = make_at_edge(lane + past, offset + 2 * past, mask + past) && all;
      }
    }
    return all;
  }

 private:
  // exp(logit - largest); in half types by one fused step.
  __device__ float exponential(float logit) const {
    if constexpr (sizeof(T) == sizeof(float)) return exp_of(logit - largest);
    return fast_exp2(fused(logit, kLog2E, -largest_log2));
  }

  __device__ void normalise(float (&masks)[kTrips]) {
    largest = masks[0];
#pragma unroll
    for (int t = 1; t < kTrips; ++t) largest = larger(largest, masks[t]);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    largest_log2 = largest * kLog2E;
    float sum = 0;
#pragma unroll
    for (int t = 0; t < kTrips; ++t) {
      masks[t] = exponential(masks[t]);
      sum += masks[t];
    }
    inverse = fast_reciprocal(sum_over_lanes(sum, kLanes));
#pragma unroll
    for (int t = 0; t < kTrips; ++t) masks[t] *= inverse;
  }

  // Of a point whose corners are all inside, which it returns; else what it leaves is made again.
  __device__ bool make_inside(int t, const float (&offsets)[2], float mask) const {
    float right, bottom;
    const int x = whole_of(offsets[0], right) + first_x[t];
    const int y = whole_of(offsets[1], bottom) + first_y[t];
    const uint32_t corner = static_cast<uint32_t>(y) * static_cast<uint32_t>(shape.row) +
                            static_cast<uint32_t>(x) * static_cast<uint32_t>(shape.channels);
    const uint32_t lower = corner + static_cast<uint32_t>(shape.row);
    const int k = lane + t * kLanes;
    at[k] = make_uint4(corner, corner + static_cast<uint32_t>(shape.channels), lower,
                       lower + static_cast<uint32_t>(shape.channels));
    weights[k] = as_float4(CornerWeights<float>(right, bottom, mask));
    return (static_cast<uint32_t>(x) < shape.last_column) &
           (static_cast<uint32_t>(y) < shape.last_row);
  }

  // floor(offset * scale), and the rest. Downwards to a number whose last bit is 1: right below
  // 2^22; what is not, NaN too, is an integer far from every pixel.
  __device__ int whole_of(float offset, float& rest) const {
    constexpr float kUnit = 12582912;  // 1.5 * 2^23
    constexpr int kUnitBits = 0x4b400000;
    const float sum = fused_down(offset, shape.scale, kUnit);
    rest = fused(offset, shape.scale, kUnit - sum);
    return __float_as_int(sum) - kUnitBits;
  }

  // Returns whether it is valid, or is lost and counts at the first pixel.
  __device__ bool make_at_edge(int k, const T* offset, const T* mask) const {
    Point<float> point;
    int x, y;
    const auto place_of = [&](float offset, int base, int extent, int step, int& whole,
                              float& fraction) {
      return place(stretched(offset, shape.scale), base, extent, step, 0.0f, whole, fraction);
    };
    const bool valid_x =
        place_of(load_value(offset), base_x, shape.width, shape.step_x[k], x, point.x);
    const bool valid_y =
        place_of(load_value(offset + 1), base_y, shape.height, shape.step_y[k], y, point.y);
    const float value = load_value(mask);
    point.weight = shape.softmax ? exponential(value) * inverse : value;
    if (!(valid_x && valid_y)) {
      const bool lost = keep_if_lost(params.shape, point) != 0;
      const uint32_t pixel = lost ? 0 : kNotValid;
      at[k] = make_uint4(pixel, pixel, pixel, pixel);
      weights[k] = make_float4(point.weight, point.weight, point.weight, point.weight);
      return lost;
    }
    // A corner outside has no weight, and the place of one inside, whose value counts anyway.
    const bool has_left = x >= 0, has_right = x + 1 < shape.width;
    const bool has_top = y >= 0, has_bottom = y + 1 < shape.height;
    const uint32_t left = (has_left ? x : 0) * shape.channels;
    const uint32_t right = (has_right ? x + 1 : x) * shape.channels;
    const uint32_t upper = (has_top ? y : 0) * shape.row;
    const uint32_t lower = (has_bottom ? y + 1 : y) * shape.row;
    const CornerWeights<float> by(point);
    at[k] = make_uint4(upper + left, upper + right, lower + left, lower + right);
    weights[k] = make_float4(
        has_top && has_left ? by.at[0] : 0.0f, has_top && has_right ? by.at[1] : 0.0f,
        has_bottom && has_left ? by.at[2] : 0.0f, has_bottom && has_right ? by.at[3] : 0.0f);
    return true;
  }

  const Dcnv3Params& params;
  const NineShape& shape;
  int base_x, base_y, lane;
  bool has_last;                         // not all lanes have kTrips points
  int first_x[kTrips], first_y[kTrips];  // of its points, without an offset
  uint4* at;        // elements past the image's first pixel, of corners row by row
  float4* weights;  // of the corners, with the mask
  float largest, largest_log2, inverse;  // of the softmax
};

// Adds a point's sample to the sum, or sets it.
template <bool kSet, int kVector, class T>
__device__ inline void add_corners(const T* x, const uint4& at, const float4& weights,
                                   float (&sum)[kVector]) {
  const Vec<T, kVector> corners[4] = {load<kVector>(x + at.x), load<kVector>(x + at.y),
                                      load<kVector>(x + at.z), load<kVector>(x + at.w)};
  const float by[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float values[kVector];
    widen(corners[c], values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum[i] = kSet && c == 0 ? by[c] * values[i] : sum[i] + by[c] * values[i];
    }
  }
}

// Grid: x over the blocks of an image, y over the images; both strided.
template <class T, int kGroupSize, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dcnv3_nine_kernel(const Dcnv3Params params, const NineShape shape) {
  using Layout = NineLayout<T, kGroupSize>;
  constexpr int kVector = Layout::kVector, kWarps = kThreads / kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes, in_warp = threadIdx.x % kWarpLanes;
  const int own = in_warp / Layout::kLanes, lane = in_warp % Layout::kLanes;
  auto* at = reinterpret_cast<uint4*>(dynamic_shared() + warp * Layout::kWarpBytes);
  auto* weights = reinterpret_cast<float4*>(at + Layout::kUnits * Layout::kPitch);
  at += own * Layout::kPitch;
  weights += own * Layout::kPitch;

  for (int block = blockIdx.x; block < shape.blocks; block += gridDim.x) {
    const int wanted = (block * kWarps + warp) * Layout::kUnits + own;
    const int unit = wanted < shape.units ? wanted : shape.units - 1;  // one that exists, for all
    const int pixel = shape.by_groups.divide(unit), group = unit - pixel * shape.groups;
    const int row = shape.by_width.divide(pixel), column = pixel - row * shape.out_width;
    NineMaker<T, kGroupSize> maker(params, shape, column * shape.stride_x + shape.base_x,
                                   row * shape.stride_y + shape.base_y, lane, at, weights);
    const int channel = lane * kVector;
    const int exists = in_register(unit == wanted);
    const int64_t index = int64_t{blockIdx.y} * shape.units + unit;
    const T* offset = static_cast<const T*>(params.offset) + 2 * (kNinePoints * index + lane);
    const T* mask = static_cast<const T*>(params.mask) + kNinePoints * index + lane;
    const T* x = static_cast<const T*>(params.x) + blockIdx.y * shape.image_size +
                 (group * kGroupSize + channel);
    T* out = static_cast<T*>(params.out) + index * kGroupSize + channel;
    for (int image = blockIdx.y; image < shape.batch; image += gridDim.y) {
      const bool all = maker.make(offset, mask);
      const bool every = __all_sync(0xffffffffu, all);
      __syncwarp();

      float sum[kVector];
      if (every) {
        add_corners<true>(x, at[0], weights[0], sum);
#pragma unroll(kVector > 4 ? kNinePoints - 1 : 4)  // all of float32 take registers too many
        for (int k = 1; k < kNinePoints; ++k) {
          add_corners<false>(x, at[k], weights[k], sum);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] = 0;
#pragma unroll 1
        for (int k = 0; k < kNinePoints; ++k) {
          const uint4 corners = at[k];
          if (corners.x != kNotValid) add_corners<false>(x, corners, weights[k], sum);
        }
      }
      if (exists) store(out, round_to<T>(sum));
      offset += 2 * shape.mask_step;
      mask += shape.mask_step;
      x += shape.x_step;
      out += shape.out_step;
      __syncwarp();
    }
  }
}

}  // namespace m3i::dcnv3
