// dcnv3 on the CPU: the loops over points and channels, on planes.
//
// What binds, with 16 channels of float32 in one AVX-512 register (Zen 5): loads, two a cycle. A
// point's four weights are therefore one load and four shuffles within 128 bits. In scatter() it is
// the way of a sum through memory: a corner that two points close in time share waits for the first
// one's store, about 13 cycles.
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
  int64_t size;     // of the plane: a multiple of 64 bytes

  explicit PlaneLayout(const Dcnv3Shape& shape)
      : vectors(round_up(shape.group_size, kSize) / kSize),
        pitch(vectors * kSize),
        row((shape.width + 2) * pitch),
        size(round_up((shape.height + 3) * row, kAlignment / 4)) {}
};

// A point's four weights, each in all lanes of a vector.
template <class A, int kSize>
class Weights {
 public:
  explicit Weights(const A* corners) {
#if M3I_VECTOR_BYTES == 64
    if constexpr (kSize == 16) quads_ = _mm512_broadcast_f32x4(_mm_loadu_ps(corners));
    if constexpr (kSize == 8 && sizeof(A) == 8) {
      quads_ = _mm512_broadcast_f64x4(_mm256_loadu_pd(corners));
    }
#endif
#if M3I_VECTOR_BYTES >= 32
    if constexpr (kSize == 8 && sizeof(A) == 4) {
      quads_ = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(corners));
    }
#endif
    if constexpr (kSize == 4) quads_ = load<4>(corners);
  }

  template <int kCorner>
  Vec<A, kSize> of() const {
    return of<kCorner>(std::make_integer_sequence<int, kSize>{});
  }

 private:
  template <int kCorner, int... kIndices>
  Vec<A, kSize> of(std::integer_sequence<int, kIndices...>) const {
    return __builtin_shufflevector(quads_, quads_, (kIndices / 4 * 4 + kCorner)...);
  }

  Vec<A, kSize> quads_;
};

// out[pixel] = sum over its points of the weighted corners, in kVectors vectors of channels; kPitch
// is that of the layout where these are all of a pixel's, else 0.
template <class A, int kSize, int kVectors, int kPitch>
[[gnu::noinline]] void sample_vectors(const PlaneLayout<kSize>& layout, const IntOf<A>* pixel,
                                      const A* corners, int64_t num_pixels, int64_t num_points,
                                      const A* plane, A* out) {
  const int64_t pitch = kPitch ? kPitch : layout.pitch, row = layout.row;
  for (const A* end = out + num_pixels * pitch; out != end; out += pitch) {
    Vec<A, kSize> sum[kVectors] = {};
    for (const IntOf<A>* last = pixel + num_points; pixel != last; ++pixel, corners += 4) {
      const A* top = plane + *pixel * pitch;
      const A* bottom = top + row;
      const Weights<A, kSize> weights(corners);
      for (int v = 0; v < kVectors; ++v, top += kSize, bottom += kSize) {
        // Four products first, so that the chain of dependent additions is one a point.
        Vec<A, kSize> value = weights.template of<0>() * load<kSize>(top);
        value += weights.template of<1>() * load<kSize>(top + pitch);
        value += weights.template of<2>() * load<kSize>(bottom);
        value += weights.template of<3>() * load<kSize>(bottom + pitch);
        sum[v] += value;
      }
    }
    for (int v = 0; v < kVectors; ++v) store(out + v * kSize, sum[v]);
  }
}

template <class A, int kSize>
void sample(const PlaneLayout<kSize>& layout, const Points<A>& points, int64_t num_pixels,
            int64_t num_points, const A* plane, A* out) {
  int64_t v = 0;
  const auto next = [&](auto count, auto pitch) {
    constexpr int kVectors = decltype(count)::value;
    sample_vectors<A, kSize, kVectors, decltype(pitch)::value>(layout, points.pixel, points.corners,
                                                               num_pixels, num_points,
                                                               plane + v * kSize, out + v * kSize);
    v += kVectors;
  };
  using std::integral_constant;
  if (layout.vectors == 1)
    return next(integral_constant<int, 1>{}, integral_constant<int, kSize>{});
  if (layout.vectors == 2) {
    return next(integral_constant<int, 2>{}, integral_constant<int, 2 * kSize>{});
  }
  constexpr integral_constant<int, 0> kAny{};
  while (v + 4 <= layout.vectors) next(integral_constant<int, 4>{}, kAny);
  while (v + 2 <= layout.vectors) next(integral_constant<int, 2>{}, kAny);
  if (v < layout.vectors) next(integral_constant<int, 1>{}, kAny);
}

// A pixel's gradient: in registers where it has kVectors vectors, in memory where kVectors is 0.
template <class A, int kSize, int kVectors>
struct PixelGrad {
  static constexpr int kPitch = kVectors * kSize;
  Vec<A, kSize> vectors[kVectors ? kVectors : 1];
  const A* from;

  explicit PixelGrad(const A* from) : from(from) {
    for (int v = 0; v < kVectors; ++v) vectors[v] = load<kSize>(from + v * kSize);
  }
  Vec<A, kSize> operator[](int64_t v) const {
    if constexpr (kVectors) return vectors[v];
    return load<kSize>(from + v * kSize);
  }
};

// dots[point] = grad_out[its pixel] times each corner, summed over the channels. kVectors of a
// pixel; 0: any number.
template <class A, int kSize, int kVectors>
[[gnu::noinline]] void multiply_corners(const PlaneLayout<kSize>& layout, const IntOf<A>* pixel,
                                        int64_t num_pixels, int64_t num_points, const A* plane,
                                        const A* grad_out, A* dots) {
  using Values = Vec<A, kSize>;
  using Grad = PixelGrad<A, kSize, kVectors>;
  constexpr int kJoined = kSize / 4;  // points whose sums fill a vector
  const int64_t pitch = kVectors ? Grad::kPitch : layout.pitch, row = layout.row;
  const int64_t vectors = kVectors ? kVectors : layout.vectors;
  const auto set_quads = [&](const Grad& grad, IntOf<A> at, Values& quads) {
    const A* top = plane + at * pitch;
    const A* bottom = top + row;
    Values sums[4] = {};
    for (int64_t v = 0; v < vectors; ++v, top += kSize, bottom += kSize) {
      sums[0] += grad[v] * load<kSize>(top);
      sums[1] += grad[v] * load<kSize>(top + pitch);
      sums[2] += grad[v] * load<kSize>(bottom);
      sums[3] += grad[v] * load<kSize>(bottom + pitch);
    }
    quads = quads_of<A, kSize>(sums[0], sums[1], sums[2], sums[3]);
  };
  for (int64_t p = 0; p < num_pixels; ++p, grad_out += pitch, pixel += num_points) {
    const Grad grad(grad_out);
    int64_t k = 0;
    for (; k + kJoined <= num_points; k += kJoined, dots += kSize) {
      Values parts[kJoined];
      for (int j = 0; j < kJoined; ++j) set_quads(grad, pixel[k + j], parts[j]);
      store(dots, join<A, kSize>(parts));
    }
    for (; k < num_points; ++k, dots += 4) {
      Values rest;
      set_quads(grad, pixel[k], rest);
      store(dots, fold<A, kSize>(rest));
    }
  }
}

// plane[corners of each point] += grad_out[its pixel] times the corner's weight, for kApart pixels
// that are `distance` apart, point by point in turn.
template <class A, int kSize, int kVectors, int kApart>
inline void scatter_apart(const PlaneLayout<kSize>& layout, const IntOf<A>* pixel, const A* corners,
                          int64_t distance, int64_t num_points, const A* grad_out, A* plane) {
  using Values = Vec<A, kSize>;
  using Grad = PixelGrad<A, kSize, kVectors>;
  const int64_t pitch = kVectors ? Grad::kPitch : layout.pitch, row = layout.row;
  const int64_t vectors = kVectors ? kVectors : layout.vectors;
  const auto add = [&](const IntOf<A>* at, const A* from, const Grad& grad) {
    A* top = plane + *at * pitch;
    A* bottom = top + row;
    const Weights<A, kSize> weights(from);
    for (int64_t v = 0; v < vectors; ++v, top += kSize, bottom += kSize) {
      const Values top_left = load<kSize>(top) + weights.template of<0>() * grad[v];
      const Values top_right = load<kSize>(top + pitch) + weights.template of<1>() * grad[v];
      const Values bottom_left = load<kSize>(bottom) + weights.template of<2>() * grad[v];
      const Values bottom_right = load<kSize>(bottom + pitch) + weights.template of<3>() * grad[v];
      store(top, top_left);
      store(top + pitch, top_right);
      store(bottom, bottom_left);
      store(bottom + pitch, bottom_right);
    }
  };
  const int64_t step = distance * num_points;
  if constexpr (kApart == 1) {
    const Grad grad(grad_out);
    for (int64_t k = 0; k < num_points; ++k) add(pixel + k, corners + 4 * k, grad);
  } else {
    static_assert(kApart == 4);
    const Grad first(grad_out), second(grad_out + distance * pitch);
    const Grad third(grad_out + 2 * distance * pitch), fourth(grad_out + 3 * distance * pitch);
    for (int64_t k = 0; k < num_points; ++k) {
      add(pixel + k, corners + 4 * k, first);
      add(pixel + k + step, corners + 4 * (k + step), second);
      add(pixel + k + 2 * step, corners + 4 * (k + 2 * step), third);
      add(pixel + k + 3 * step, corners + 4 * (k + 3 * step), fourth);
    }
  }
}

// Of all pixels of a block. The points of four pixels far from each other take turns, since they
// rarely share a corner, where those of one pixel often do.
template <class A, int kSize, int kVectors>
[[gnu::noinline]] void scatter(const PlaneLayout<kSize>& layout, const IntOf<A>* pixel,
                               const A* corners, int64_t num_pixels, int64_t num_points,
                               const A* grad_out, A* plane) {
  const auto from = [&](auto apart, int64_t first, int64_t distance) {
    const int64_t point = first * num_points;
    scatter_apart<A, kSize, kVectors, decltype(apart)::value>(
        layout, pixel + point, corners + 4 * point, distance, num_points,
        grad_out + first * layout.pitch, plane);
  };
  const int64_t distance = num_pixels / 4;
  for (int64_t p = 0; p < distance; ++p) from(std::integral_constant<int, 4>{}, p, distance);
  for (int64_t p = 4 * distance; p < num_pixels; ++p) from(std::integral_constant<int, 1>{}, p, 0);
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
