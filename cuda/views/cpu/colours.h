// views on the CPU: colour steps and the blur, in vectors of floats.
//
// All steps of a pixel happen in registers. Contrast needs the mean gray of what comes before it,
// so there are two passes where other steps do, and where none does, one to sum the gray.
#pragma once

#include "views/cpu/lanes.h"

namespace m3i {
namespace views {
namespace {

// Planes [3, count] of uint8.
struct Planes {
  uint8_t* data;
  int64_t count;
};

inline PixelOf<Floats> load_pixels(const Planes& planes, int64_t at) {
  return {load_bytes(planes.data + at), load_bytes(planes.data + planes.count + at),
          load_bytes(planes.data + 2 * planes.count + at)};
}

// Steps [begin, end) of a plan on the pixels of a vector at `at`; returns their gray, if asked for.
template <bool kSums>
inline Floats colour_at(const ColourPlan& plan, int begin, int end, float mean,
                        const Planes& planes, int64_t at) {
  PixelOf<Floats> p = load_pixels(planes, at);
  for (int k = begin; k < end; ++k) p = coloured(p, plan, plan.step[k], mean);
  if (begin < end) {
    store_bytes(planes.data + at, p.r);
    store_bytes(planes.data + planes.count + at, p.g);
    store_bytes(planes.data + 2 * planes.count + at, p.b);
  }
  return kSums ? gray_of(p) : Floats{};
}

// Steps [begin, end) of a plan on all pixels; returns the sum of their gray, if asked for.
template <bool kSums>
int64_t colour(const ColourPlan& plan, int begin, int end, float mean, const Planes& planes) {
  int64_t sum = 0, at = 0;
  const int64_t whole = planes.count / kFloats * kFloats;
  while (at < whole) {
    // Sums of whole numbers are exact in fp32 below 2^24: 4,096 of at most 255 are
    const int64_t stop = whole - at > 4096 * kFloats ? at + 4096 * kFloats : whole;
    Floats sums = {};
    for (; at < stop; at += kFloats) sums += colour_at<kSums>(plan, begin, end, mean, planes, at);
    if (kSums) {
      for (int i = 0; i < kFloats; ++i) sum += static_cast<int64_t>(sums[i]);
    }
  }
  if (at == planes.count) return sum;
  // The last pixels, in planes of one vector each
  uint8_t rest[kViewChannels * kFloats] = {};
  const size_t left = static_cast<size_t>(planes.count - at);
  for (int c = 0; c < kViewChannels; ++c) {
    std::memcpy(rest + c * kFloats, planes.data + c * planes.count + at, left);
  }
  const Floats gray = colour_at<kSums>(plan, begin, end, mean, {rest, kFloats}, 0);
  for (int c = 0; c < kViewChannels; ++c) {
    std::memcpy(planes.data + c * planes.count + at, rest + c * kFloats, left);
  }
  for (size_t i = 0; kSums && i < left; ++i) sum += static_cast<int64_t>(gray[i]);
  return sum;
}

inline void change_colours(const ColourPlan& plan, const Planes& planes) {
  if (plan.contrast_at < plan.count) {
    const int64_t sum = colour<true>(plan, 0, plan.contrast_at, 0, planes);
    colour<false>(plan, plan.contrast_at, plan.count, gray_mean(sum, planes.count), planes);
  } else if (plan.count > 0) {
    colour<false>(plan, 0, plan.count, 0, planes);
  }
}

// ---- Blur ---------------------------------------------------------------------------------------

// Floats of a row of the blur: the row and its reflections, in whole vectors.
inline size_t blur_row_floats(int32_t size, int half) {
  return static_cast<size_t>(size) + 2 * half + 2 * kFloats;
}

// Floats from a row of the blurred plane to the next.
inline size_t blur_pitch(int32_t size) {
  return (static_cast<size_t>(size) + kFloats - 1) / kFloats * kFloats;
}

struct Blur {
  const float* weights;  // [radius + 1]
  int radius;
  int32_t size;
  bool solarizes;
  float* row;     // [blur_row_floats]
  float* across;  // [size, blur_pitch], blurred along rows
};

inline void blur_row(const Blur& of, const uint8_t* from, float* to) {
  float* row = of.row + of.radius;
  for (int32_t x = 0; x < of.size; ++x) row[x] = static_cast<float>(from[x]);
  for (int k = 1; k <= of.radius; ++k) {
    row[-k] = row[k];
    row[of.size - 1 + k] = row[of.size - 1 - k];
  }
  for (int32_t x = 0; x < of.size; x += kFloats) {
    Floats sum = load<kFloats>(row + x) * of.weights[0];
    for (int k = 1; k <= of.radius; ++k) {
      const Floats both = load<kFloats>(row + x - k) + load<kFloats>(row + x + k);
      sum = Ops<Floats>::fma(Ops<Floats>::all(of.weights[k]), both, sum);
    }
    store(to + x, sum);
  }
}

// `to`: a row of uint8, of which only `size` are written.
inline void blur_column(const Blur& of, int32_t y, uint8_t* to) {
  using O = Ops<Floats>;
  const size_t pitch = blur_pitch(of.size);
  for (int32_t x = 0; x < of.size; x += kFloats) {
    const auto at = [&](int32_t place) {
      return load<kFloats>(of.across + reflected(place, of.size) * pitch + x);
    };
    Floats sum = at(y) * of.weights[0];
    for (int k = 1; k <= of.radius; ++k) {
      sum = O::fma(O::all(of.weights[k]), at(y - k) + at(y + k), sum);
    }
    Floats value = clamped(O::even(sum), 255.0f);
    if (of.solarizes) value = solarized(value);
    if (x + kFloats <= of.size) {
      store_bytes(to + x, value);
    } else {
      uint8_t rest[kFloats];
      store_bytes(rest, value);
      std::memcpy(to + x, rest, static_cast<size_t>(of.size - x));
    }
  }
}

inline void blur_plane(const Blur& of, uint8_t* plane) {
  const size_t pitch = blur_pitch(of.size), size = static_cast<size_t>(of.size);
  for (size_t y = 0; y < size; ++y) blur_row(of, plane + y * size, of.across + y * pitch);
  for (int32_t y = 0; y < of.size; ++y) blur_column(of, y, plane + y * size);
}

}  // namespace
}  // namespace views
}  // namespace m3i
