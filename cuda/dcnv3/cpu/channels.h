// dcnv3 on the CPU: the loops over points and channels, on planes.
#pragma once

#include "dcnv3/cpu/points.h"

namespace m3i {
namespace {

// The layout of a plane, in elements; vectors have kSize.
template <int kSize>
struct PlaneLayout {
  int64_t vectors;  // of a pixel
  int64_t pitch;    // of a pixel: vectors * kSize
  int64_t row;      // of a row of pixels, ring included
  int64_t size;     // of the plane

  explicit PlaneLayout(const Dcnv3Shape& shape)
      : vectors(round_up(shape.group_size, kSize) / kSize),
        pitch(vectors * kSize),
        row((shape.width + 2) * pitch),
        size((shape.height + 3) * row) {}
};

// out[pixel] = sum over its points of the weighted corners, in kVectors vectors of channels.
template <class A, int kSize, int kVectors>
void sample_vectors(const PlaneLayout<kSize>& layout, const Points<A>& points, int64_t num_pixels,
                    int64_t num_points, const A* plane, A* out) {
  using Values = Vec<A, kSize>;
  const int64_t pitch = layout.pitch, row = layout.row;
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    Values sum[kVectors] = {};
    for (int64_t i = pixel * num_points; i < (pixel + 1) * num_points; ++i) {
      const A* at = plane + points.pixel[i] * pitch;
      for (int v = 0; v < kVectors; ++v, at += kSize) {
        // Four products first, so that the chain of dependent additions is one a point.
        Values value = points.corner[0][i] * load<kSize>(at);
        value += points.corner[1][i] * load<kSize>(at + pitch);
        value += points.corner[2][i] * load<kSize>(at + row);
        value += points.corner[3][i] * load<kSize>(at + row + pitch);
        sum[v] += value;
      }
    }
    for (int v = 0; v < kVectors; ++v) store(out + pixel * pitch + v * kSize, sum[v]);
  }
}

template <class A, int kSize>
void sample(const PlaneLayout<kSize>& layout, const Points<A>& points, int64_t num_pixels,
            int64_t num_points, const A* plane, A* out) {
  const int64_t whole = layout.vectors;
  int64_t v = 0;
  const auto next = [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    for (; v + kVectors <= whole; v += kVectors) {
      sample_vectors<A, kSize, kVectors>(layout, points, num_pixels, num_points, plane + v * kSize,
                                         out + v * kSize);
    }
  };
  next(std::integral_constant<int, 4>{});
  next(std::integral_constant<int, 2>{});
  next(std::integral_constant<int, 1>{});
}

// dots[point] = grad_out[its pixel] times each corner, summed over the channels. kVectors of a
// pixel; 0: any number.
template <class A, int kSize, int kVectors>
void multiply_corners(const PlaneLayout<kSize>& layout, const Points<A>& points, int64_t num_pixels,
                      int64_t num_points, const A* plane, const A* grad_out) {
  using Values = Vec<A, kSize>;
  const int64_t pitch = layout.pitch, row = layout.row;
  const int64_t vectors = kVectors ? kVectors : layout.vectors;
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    const A* grad = grad_out + pixel * pitch;
    for (int64_t i = pixel * num_points; i < (pixel + 1) * num_points; ++i) {
      const A* at = plane + points.pixel[i] * pitch;
      Values top_left = {}, top_right = {}, bottom_left = {}, bottom_right = {};
      for (int64_t v = 0; v < vectors; ++v, at += kSize) {
        const Values factor = load<kSize>(grad + v * kSize);
        top_left += factor * load<kSize>(at);
        top_right += factor * load<kSize>(at + pitch);
        bottom_left += factor * load<kSize>(at + row);
        bottom_right += factor * load<kSize>(at + row + pitch);
      }
      store(points.dots + 4 * i, sums_of<A, kSize>(top_left, top_right, bottom_left, bottom_right));
    }
  }
}

// plane[corners of each point] += grad_out[its pixel] times the corner's weight.
template <class A, int kSize, int kVectors>
void scatter(const PlaneLayout<kSize>& layout, const Points<A>& points, int64_t num_pixels,
             int64_t num_points, const A* grad_out, A* plane) {
  const int64_t pitch = layout.pitch, row = layout.row;
  const int64_t vectors = kVectors ? kVectors : layout.vectors;
  const auto add = [](A* to, const Vec<A, kSize>& value) { store(to, load<kSize>(to) + value); };
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    const A* grad = grad_out + pixel * pitch;
    for (int64_t i = pixel * num_points; i < (pixel + 1) * num_points; ++i) {
      A* at = plane + points.pixel[i] * pitch;
      for (int64_t v = 0; v < vectors; ++v, at += kSize) {
        const auto value = load<kSize>(grad + v * kSize);
        add(at, points.corner[0][i] * value);
        add(at + pitch, points.corner[1][i] * value);
        add(at + row, points.corner[2][i] * value);
        add(at + row + pitch, points.corner[3][i] * value);
      }
    }
  }
}

// body(std::integral_constant<int, n>{}): the number of vectors of a pixel if it is 1 or 2, else 0.
template <class Body>
void dispatch_vectors(int64_t vectors, Body&& body) {
  if (vectors == 1) {
    body(std::integral_constant<int, 1>{});
  } else if (vectors == 2) {
    body(std::integral_constant<int, 2>{});
  } else {
    body(std::integral_constant<int, 0>{});
  }
}

}  // namespace
}  // namespace m3i
