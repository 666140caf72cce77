// dcnv3 on the CPU: places and weights of a block's samples, and the gradients by them.
//
// A block is some neighbouring output pixels of one group, in one row or in several whole rows;
// point i * K + k is the k-th of its i-th pixel. Every loop here runs over the points of a block as
// one row of vectors; lanes of the last vector past the points are not used.
#pragma once

#include "dcnv3/params.h"
#include "dcnv3/tiles.h"
#include "m3i/cpu/vec.h"

#include <cmath>

namespace m3i {
namespace {

// Approximate number of points of a block, whose arrays fit the L1 cache.
constexpr int64_t kBlockPoints = dcnv3::kCpuBlockPoints;

// Approximate size of a band's offsets and masks.
constexpr int64_t kBandBytes = 32 * 1024;

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
  // [points] of the upper left corner in the plane; `nowhere` or more if not valid, kLost if lost
  IntOf<A>* pixel;
  A* corners;  // [points, 4] the corners' weights times mask; 0 if not valid
  A* dots;     // [points, 4] grad_out times the corners, summed over channels
  // Tables, the same for every block:
  IntOf<A>* column;    // [points] of x from that of the block's first output pixel, rounded down
  IntOf<A>* row;       // [points] likewise
  A* column_fraction;  // [points] what the rounding left; 0 if offset_scale is whole
  A* row_fraction;     // [points]
};

// Output pixels of the largest block: whole rows where several fit, else a part of one.
inline int64_t block_pixels(const Dcnv3Shape& shape) {
  const int64_t most = kBlockPoints / shape.points, width = shape.out_width;
  if (most < 2 * width) return most < 1 ? 1 : most < width ? most : width;
  return width * (most / width < shape.out_height ? most / width : shape.out_height);
}

// The plane has one ring of zeros around the image and one more row: 2 x 2 pixels from here, or
// from further right in this row, are zeros.
inline int64_t nowhere(const Dcnv3Shape& shape) { return (shape.height + 1) * (shape.width + 2); }

// Such pixels for the points of a vector: were they all the same, their sums would wait for each
// other.
template <class A>
Vec<IntOf<A>, kLanes<A>> pixels_nowhere(const Dcnv3Shape& shape) {
  const int64_t columns = shape.width / 2 + 1;
  Vec<IntOf<A>, kLanes<A>> pixels;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    pixels[lane] = static_cast<IntOf<A>>(nowhere(shape) + lane % columns * 2);
  }
  return pixels;
}

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
  points.corners = arena.take<A>(4 * capacity);
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
    const int64_t column = pixel % shape.out_width, row = pixel / shape.out_width;
    for (int64_t i = 0; i < shape.kernel_width; ++i) {
      for (int64_t j = 0; j < shape.kernel_height; ++j) {
        if (shape.remove_center && i == shape.kernel_width / 2 && j == shape.kernel_height / 2) {
          continue;
        }
        split(i * shape.dilation_width - centre(shape.kernel_width, shape.dilation_width),
              points.column[at], points.column_fraction[at]);
        split(j * shape.dilation_height - centre(shape.kernel_height, shape.dilation_height),
              points.row[at], points.row_fraction[at]);
        points.column[at] += static_cast<IntOf<A>>(column * shape.stride_width);
        points.row[at++] += static_cast<IntOf<A>>(row * shape.stride_height);
      }
    }
  }
}

// Whether the window, scaled, lies on whole pixels and near.
inline bool is_whole(const Dcnv3Shape& shape) {
  const double width = static_cast<double>(shape.dilation_width * (shape.kernel_width - 1));
  const double height = static_cast<double>(shape.dilation_height * (shape.kernel_height - 1));
  const double reach = (width > height ? width : height) * std::abs(shape.offset_scale);
  return std::floor(shape.offset_scale) == shape.offset_scale && reach < kFar;
}

// One coordinate of points in the plane, split into whole pixels and the fraction beyond.
template <class A>
struct Places {
  using Values = Vec<A, kLanes<A>>;
  using Ints = Vec<IntOf<A>, kLanes<A>>;
  using Bits = Vec<std::make_unsigned_t<IntOf<A>>, kLanes<A>>;  // their sums wrap

  Bits whole;  // in [0, extent] where valid; the image begins at 1
  Values fraction;

  // `distance` is that of the block and the table. Here the table is whole: an offset without an
  // integer, which is converted to the least one or the largest, stays outside.
  Places(Values offset, Bits distance) {
    const Values below = floor_of<A, kLanes<A>>(offset);
    fraction = offset - below;
    whole = convert(below) + distance;
  }

  // An offset is split before it is added: the sum of fractions has one rounding error at most,
  // however large the offset. One that is NaN is put outside, like those far away. Where the table
  // is whole, an offset's fraction may round to 1 and is not carried, as above.
  Places(Values offset, Bits distance, Values table_fraction) {
    constexpr A kOutside = 2 * static_cast<A>(kFar);
    offset = offset < kOutside ? offset : broadcast<kLanes<A>>(kOutside);
    offset = offset > -kOutside ? offset : broadcast<kLanes<A>>(-kOutside);
    const Values below = floor_of<A, kLanes<A>>(offset);
    const Values sum = offset - below + table_fraction;
    const Values carry = table_fraction > 0 ? floor_of<A, kLanes<A>>(sum) : Values{};  // 0 or 1
    fraction = sum - carry;
    whole = convert(below) + convert(carry) + distance;
  }

  // The sign bit is set where the coordinate is not valid. At -1 exactly it is not, though its one
  // corner inside has no weight: it has a derivative.
  Bits invalid(IntOf<A> extent) const {
    const Bits last = Bits{} + static_cast<std::make_unsigned_t<IntOf<A>>>(extent);
    return whole | (last - whole) | ((whole | bit_cast<Bits>(fraction)) - 1);
  }

 private:
  static Bits convert(Values value) { return bit_cast<Bits>(__builtin_convertvector(value, Ints)); }
};

// Point by point, since blocks with values that are not finite are rare.
template <class A>
void mark_lost(const Dcnv3Shape& shape, int64_t count, const Points<A>& points) {
  for (int64_t i = 0; i < count; ++i) {
    const A place = points.offset[2 * i] * 0 + points.offset[2 * i + 1] * 0;  // 0 or NaN
    const A weight = points.pixel[i] >= nowhere(shape) ? points.mask[i] * 0 : 0;
    const A lost = place + weight;
    if (lost == 0) continue;
    points.fraction_x[i] = points.fraction_y[i] = lost;
    points.pixel[i] = kLost;
    for (int corner = 0; corner < 4; ++corner) points.corners[4 * i + corner] = lost;
  }
}

// Stores a0 b0 c0 d0 a1 ... in memory.
template <class A, int kSize>
inline void store_zipped(A* to, const Vec<A, kSize>& a, const Vec<A, kSize>& b,
                         const Vec<A, kSize>& c, const Vec<A, kSize>& d) {
  const auto ac_low = shuffle_by<ZipLow, A, kSize>(a, c),
             bd_low = shuffle_by<ZipLow, A, kSize>(b, d);
  const auto ac_high = shuffle_by<ZipHigh, A, kSize>(a, c);
  const auto bd_high = shuffle_by<ZipHigh, A, kSize>(b, d);
  store(to, shuffle_by<ZipLow, A, kSize>(ac_low, bd_low));
  store(to + kSize, shuffle_by<ZipHigh, A, kSize>(ac_low, bd_low));
  store(to + 2 * kSize, shuffle_by<ZipLow, A, kSize>(ac_high, bd_high));
  store(to + 3 * kSize, shuffle_by<ZipHigh, A, kSize>(ac_high, bd_high));
}

// Offsets and masks to fractions, pixels and weights, for the block that begins at output pixel
// (row, column). kWhole: is_whole().
template <class A, bool kWhole>
[[gnu::noinline]] void locate_as(const Dcnv3Shape& shape, int64_t row, int64_t column,
                                 int64_t count, Points<A> points) {
  constexpr int kSize = kLanes<A>;
  using Int = IntOf<A>;
  using Values = Vec<A, kSize>;
  using Bits = typename Places<A>::Bits;
  // One further right and down, since the plane begins with its ring.
  const auto base_y = static_cast<Int>(row * shape.stride_height - shape.pad_height + 1 +
                                       centre(shape.kernel_height, shape.dilation_height));
  const auto base_x = static_cast<Int>(column * shape.stride_width - shape.pad_width + 1 +
                                       centre(shape.kernel_width, shape.dilation_width));
  const auto height = static_cast<Int>(shape.height), width = static_cast<Int>(shape.width);
  const Bits pitch = Bits{} + static_cast<std::make_unsigned_t<Int>>(width + 2);
  const auto outside = pixels_nowhere<A>(shape);
  const A scale = static_cast<A>(shape.offset_scale);
  const auto place = [](Values offset, Int base, const Int* table, const A* table_fraction) {
    const Bits distance =
        bit_cast<Bits>(broadcast<kSize>(base)) + bit_cast<Bits>(load<kSize>(table));
    if constexpr (kWhole) return Places<A>(offset, distance);
    return Places<A>(offset, distance, load<kSize>(table_fraction));
  };
  Values zeros{};  // NaN where an offset or a mask is not finite
  for (int64_t i = 0; i < count; i += kSize) {
    const Values low = load<kSize>(points.offset + 2 * i);
    const Values high = load<kSize>(points.offset + 2 * i + kSize);
    const Values mask = load<kSize>(points.mask + i);
    zeros += low * 0 + high * 0 + mask * 0;
    const auto x = place(shuffle_by<Even, A, kSize>(low, high) * scale, base_x, points.column + i,
                         points.column_fraction + i);
    const auto y = place(shuffle_by<Odd, A, kSize>(low, high) * scale, base_y, points.row + i,
                         points.row_fraction + i);
    const auto valid = bit_cast<Vec<Int, kSize>>(x.invalid(width) | y.invalid(height)) >= 0;
    const auto pixel = bit_cast<Vec<Int, kSize>>(y.whole * pitch + x.whole);
    store(points.fraction_x + i, x.fraction);
    store(points.fraction_y + i, y.fraction);
    store(points.pixel + i, valid ? pixel : outside);
    const Values bottom = y.fraction * mask, top = mask - bottom;
    const Values bottom_right = bottom * x.fraction, bottom_left = bottom - bottom_right;
    const Values top_right = top * x.fraction, top_left = top - top_right;
    store_zipped<A, kSize>(points.corners + 4 * i, valid ? top_left : Values{},
                           valid ? top_right : Values{}, valid ? bottom_left : Values{},
                           valid ? bottom_right : Values{});
  }
  if (sum_of<A, kSize>(zeros) != 0) mark_lost(shape, count, points);
}

template <class A>
void locate(const Dcnv3Shape& shape, int64_t row, int64_t column, int64_t count,
            const Points<A>& points) {
  (is_whole(shape) ? locate_as<A, true> : locate_as<A, false>)(shape, row, column, count, points);
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
    const auto valid = load<kSize>(points.pixel + i) < outside;
    const Values grad_x = valid ? by_x * weight : Values{};
    const Values grad_y = valid ? by_y * weight : Values{};
    store(points.offset + 2 * i, shuffle_by<ZipLow, A, kSize>(grad_x, grad_y));
    store(points.offset + 2 * i + kSize, shuffle_by<ZipHigh, A, kSize>(grad_x, grad_y));
    store(points.grad_mask + i, valid ? by_mask : Values{});
  }
}

}  // namespace
}  // namespace m3i
