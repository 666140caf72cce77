// dcnv3 on the CPU: places and weights of a block's samples, and the gradients by them.
//
// A block is some neighbouring output pixels of one row in one group; point i * K + k is the k-th
// of its i-th pixel. Every loop here runs over the points of a block as one row of vectors; lanes
// of the last vector past the points are not used.
#pragma once

#include "dcnv3/params.h"
#include "dcnv3/tiles.h"
#include "m3i/cpu/vec.h"

#include <cmath>

namespace m3i {
namespace {

// Approximate number of points of a block, whose arrays fit the L1 cache.
constexpr int64_t kBlockPoints = dcnv3::kCpuBlockPoints;

constexpr int64_t kAlignment = 64;

// Limit in pixels: no padded image is larger, and a larger offset counts as outside.
constexpr int32_t kFar = 1 << 28;

// Table entry of a point that is outside for every block and offset.
constexpr int32_t kNever = 1 << 30;

// The first 2 x 2 pixels of the plane with its ring, the last of which is the image's first.
constexpr int32_t kLost = 0;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Allocates aligned arrays; without memory it only counts their bytes.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* array = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return array;
  }
};

// Arrays of a block, of float or double.
template <class A>
struct Points {
  A* offset;      // [points, 2] (x, y); the backward puts their gradients here
  A* mask;        // [points] after the softmax, if any
  A* grad_mask;   // [points]
  A* fraction_x;  // [points] lx; both are NaN if the point is lost
  A* fraction_y;  // [points] ly
  // [points] of the upper left corner in the plane; `nowhere` if not valid, kLost if lost
  IntOf<A>* pixel;
  A* corner[4];  // [points] the corners' weights times mask; 0 if not valid
  A* dots;       // [points, 4] grad_out times the corners, summed over channels
  // Tables, the same for every block:
  IntOf<A>* column;    // [points] of x from that of the block's first output pixel, rounded down
  IntOf<A>* row;       // [points] likewise
  A* column_fraction;  // [points] what the rounding left; 0 if offset_scale is whole
  A* row_fraction;     // [points]
};

inline int64_t block_pixels(const Dcnv3Shape& shape) {
  const int64_t pixels = kBlockPoints / shape.points;
  return pixels < 1 ? 1 : pixels < shape.out_width ? pixels : shape.out_width;
}

// The plane has one ring of zeros around the image and one more row: the 2 x 2 pixels from here
// are zeros.
inline int64_t nowhere(const Dcnv3Shape& shape) { return (shape.height + 1) * (shape.width + 2); }

template <class A>
Points<A> take_points(const Dcnv3Shape& shape, Arena& arena) {
  const int64_t capacity = round_up(block_pixels(shape) * shape.points, kLanes<A>);
  Points<A> points;
  points.offset = arena.take<A>(2 * capacity);
  points.mask = arena.take<A>(capacity);
  points.grad_mask = arena.take<A>(capacity);
  points.fraction_x = arena.take<A>(capacity);
  points.fraction_y = arena.take<A>(capacity);
  points.pixel = arena.take<IntOf<A>>(capacity);
  for (A*& weight : points.corner) weight = arena.take<A>(capacity);
  points.dots = arena.take<A>(4 * capacity);
  points.column = arena.take<IntOf<A>>(capacity);
  points.row = arena.take<IntOf<A>>(capacity);
  points.column_fraction = arena.take<A>(capacity);
  points.row_fraction = arena.take<A>(capacity);
  return points;
}

inline int64_t centre(int64_t kernel, int64_t dilation) { return dilation * (kernel - 1) / 2; }

template <class A>
void fill_tables(const Dcnv3Shape& shape, const Points<A>& points) {
  const auto split = [&](int64_t distance, IntOf<A>& whole, A& fraction) {
    const double scaled = static_cast<double>(distance) * shape.offset_scale;
    const double below = std::floor(scaled);
    whole = static_cast<IntOf<A>>(std::abs(below) < kFar ? below : kNever);
    fraction = static_cast<A>(scaled - below);
  };
  int64_t at = 0;
  for (int64_t pixel = 0; pixel < block_pixels(shape); ++pixel) {
    for (int64_t i = 0; i < shape.kernel_width; ++i) {
      for (int64_t j = 0; j < shape.kernel_height; ++j) {
        if (shape.remove_center && i == shape.kernel_width / 2 && j == shape.kernel_height / 2) {
          continue;
        }
        split(i * shape.dilation_width - centre(shape.kernel_width, shape.dilation_width),
              points.column[at], points.column_fraction[at]);
        split(j * shape.dilation_height - centre(shape.kernel_height, shape.dilation_height),
              points.row[at], points.row_fraction[at]);
        points.column[at++] += static_cast<IntOf<A>>(pixel * shape.stride_width);
      }
    }
  }
}

// One coordinate of points, split into whole pixels of x and the fraction beyond.
template <class A>
struct Places {
  Vec<IntOf<A>, kLanes<A>> whole, valid;
  Vec<A, kLanes<A>> fraction;

  // `whole` and `fraction` come from the tables, `base` from the block. An offset is split before
  // it is added: the sum of fractions has one rounding error at most, however large the offset.
  Places(Vec<A, kLanes<A>> offset, IntOf<A> base, IntOf<A> extent, Vec<IntOf<A>, kLanes<A>> table,
         Vec<A, kLanes<A>> table_fraction) {
    using Values = Vec<A, kLanes<A>>;
    const auto near = (offset > -kFar) & (offset < kFar);  // not if NaN
    offset = near ? offset : Values{};
    const Values below = floor_of<A, kLanes<A>>(offset);
    fraction = offset - below + table_fraction;
    const auto carry = fraction >= 1;
    fraction = carry ? fraction - 1 : fraction;
    whole = __builtin_convertvector(below, decltype(whole)) + table + base - carry;
    valid = near & (whole < extent) & ((whole >= 0) | ((whole == -1) & (fraction > 0)));
  }
};

// Whether all offsets and masks are finite; a separate loop, which is faster than inside locate().
template <class A>
bool are_finite(int64_t count, const Points<A>& points) {
  constexpr int kSize = kLanes<A>;
  Vec<A, kSize> zeros{};  // NaN where one is not
  for (int64_t i = 0; i < count; i += kSize) {
    zeros += load<kSize>(points.offset + 2 * i) * 0 +
             load<kSize>(points.offset + 2 * i + kSize) * 0 + load<kSize>(points.mask + i) * 0;
  }
  A sum = 0;
  for (int lane = 0; lane < kSize; ++lane) sum += zeros[lane];
  return sum == 0;
}

// Point by point, since blocks with values that are not finite are rare.
template <class A>
void mark_lost(const Dcnv3Shape& shape, int64_t count, const Points<A>& points) {
  for (int64_t i = 0; i < count; ++i) {
    const A place = points.offset[2 * i] * 0 + points.offset[2 * i + 1] * 0;  // 0 or NaN
    const A weight = points.pixel[i] == nowhere(shape) ? points.mask[i] * 0 : 0;
    if (place + weight == 0) continue;
    points.fraction_x[i] = points.fraction_y[i] = place + weight;
    points.pixel[i] = kLost;
  }
}

// Offsets to fractions and pixels, for the block that begins at output pixel (row, column).
template <class A>
void locate(const Dcnv3Shape& shape, int64_t row, int64_t column, int64_t count,
            const Points<A>& points) {
  constexpr int kSize = kLanes<A>;
  using Int = IntOf<A>;
  using Values = Vec<A, kSize>;
  const auto base_y = static_cast<Int>(row * shape.stride_height - shape.pad_height +
                                       centre(shape.kernel_height, shape.dilation_height));
  const auto base_x = static_cast<Int>(column * shape.stride_width - shape.pad_width +
                                       centre(shape.kernel_width, shape.dilation_width));
  const auto height = static_cast<Int>(shape.height), width = static_cast<Int>(shape.width);
  const A scale = static_cast<A>(shape.offset_scale);
  const auto outside = broadcast<kSize>(static_cast<Int>(nowhere(shape)));
  for (int64_t i = 0; i < count; i += kSize) {
    const Values low = load<kSize>(points.offset + 2 * i);
    const Values high = load<kSize>(points.offset + 2 * i + kSize);
    const Places<A> x(shuffle_by<Even, A, kSize>(low, high) * scale, base_x, width,
                      load<kSize>(points.column + i), load<kSize>(points.column_fraction + i));
    const Places<A> y(shuffle_by<Odd, A, kSize>(low, high) * scale, base_y, height,
                      load<kSize>(points.row + i), load<kSize>(points.row_fraction + i));
    store(points.fraction_x + i, x.fraction);
    store(points.fraction_y + i, y.fraction);
    // One further right and down, since the plane begins with its ring. Zero where a place is not
    // valid, whose product may overflow.
    const auto pixel = (y.valid & (y.whole + 1)) * (width + 2) + (x.valid & (x.whole + 1));
    store(points.pixel + i, x.valid & y.valid ? pixel : outside);
  }
  if (!are_finite(count, points)) mark_lost(shape, count, points);
}

template <class A>
void weigh_corners(const Dcnv3Shape& shape, int64_t count, const Points<A>& points) {
  constexpr int kSize = kLanes<A>;
  const auto outside = static_cast<IntOf<A>>(nowhere(shape));
  for (int64_t i = 0; i < count; i += kSize) {
    const auto valid = load<kSize>(points.pixel + i) != outside;
    const Vec<A, kSize> mask = valid ? load<kSize>(points.mask + i) : Vec<A, kSize>{};
    const auto right = load<kSize>(points.fraction_x + i);
    const auto bottom = load<kSize>(points.fraction_y + i) * mask;
    const auto left = 1 - right;
    const auto top = (1 - load<kSize>(points.fraction_y + i)) * mask;
    store(points.corner[0] + i, top * left);
    store(points.corner[1] + i, top * right);
    store(points.corner[2] + i, bottom * left);
    store(points.corner[3] + i, bottom * right);
  }
}

// Gradients by mask and offset, from the dots; zero for a point that is not valid.
template <class A>
void differentiate_points(const Dcnv3Shape& shape, int64_t count, const Points<A>& points) {
  constexpr int kSize = kLanes<A>;
  using Values = Vec<A, kSize>;
  const auto outside = static_cast<IntOf<A>>(nowhere(shape));
  const A scale = static_cast<A>(shape.offset_scale);
  for (int64_t i = 0; i < count; i += kSize) {
    const A* dots = points.dots + 4 * i;
    const Values first = load<kSize>(dots), second = load<kSize>(dots + kSize);
    const Values third = load<kSize>(dots + 2 * kSize), fourth = load<kSize>(dots + 3 * kSize);
    const Values even_low = shuffle_by<Even, A, kSize>(first, second);
    const Values even_high = shuffle_by<Even, A, kSize>(third, fourth);
    const Values odd_low = shuffle_by<Odd, A, kSize>(first, second);
    const Values odd_high = shuffle_by<Odd, A, kSize>(third, fourth);
    const Values top_left = shuffle_by<Even, A, kSize>(even_low, even_high);
    const Values top_right = shuffle_by<Even, A, kSize>(odd_low, odd_high);
    const Values bottom_left = shuffle_by<Odd, A, kSize>(even_low, even_high);
    const Values bottom_right = shuffle_by<Odd, A, kSize>(odd_low, odd_high);

    const Values right = load<kSize>(points.fraction_x + i), left = 1 - right;
    const Values bottom = load<kSize>(points.fraction_y + i), top = 1 - bottom;
    const Values weight = load<kSize>(points.mask + i) * scale;
    const Values by_x = top * (top_right - top_left) + bottom * (bottom_right - bottom_left);
    const Values by_y = left * (bottom_left - top_left) + right * (bottom_right - top_right);
    const Values by_mask = top * (left * top_left + right * top_right) +
                           bottom * (left * bottom_left + right * bottom_right);
    const auto valid = load<kSize>(points.pixel + i) != outside;
    const Values grad_x = valid ? by_x * weight : Values{};
    const Values grad_y = valid ? by_y * weight : Values{};
    store(points.offset + 2 * i, shuffle_by<ZipLow, A, kSize>(grad_x, grad_y));
    store(points.offset + 2 * i + kSize, shuffle_by<ZipHigh, A, kSize>(grad_x, grad_y));
    store(points.grad_mask + i, valid ? by_mask : Values{});
  }
}

}  // namespace
}  // namespace m3i
