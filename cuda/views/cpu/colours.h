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

// Pixels that are blurred at once, in as many vectors as they take: a weight is loaded once for
// all.
inline constexpr int32_t kBlurBlock = 2 * 16;
inline constexpr int kBlurVectors = kBlurBlock / kFloats;

inline size_t blur_pitch(int32_t size) {
  return (static_cast<size_t>(size) + kBlurBlock - 1) / kBlurBlock * kBlurBlock;
}

struct Blur {
  const float* weights;  // [radius + 1]
  int radius;
  int32_t height, width;
  bool solarizes;
  float* row;                // [blur_pitch + 2 half] of the plane, with its reflections
  float* across;             // [height, blur_pitch] blurred along rows
  const float** neighbours;  // [2 half + 1] rows of `across`
};

// The sums of a block; at(k) is where the pixels k places further begin.
template <class At>
inline void blur_block(const Blur& of, const At& at, Floats* sums) {
  const float* centre = at(0);
  for (int i = 0; i < kBlurVectors; ++i) {
    sums[i] = load<kFloats>(centre + i * kFloats) * of.weights[0];
  }
  for (int k = 1; k <= of.radius; ++k) {
    const Floats weight = Ops<Floats>::all(of.weights[k]);
    const float *before = at(-k), *after = at(k);
    for (int i = 0; i < kBlurVectors; ++i) {
      const Floats both = load<kFloats>(before + i * kFloats) + load<kFloats>(after + i * kFloats);
      sums[i] = Ops<Floats>::fma(weight, both, sums[i]);
    }
  }
}

inline void blur_row(const Blur& of, const uint8_t* from, float* to) {
  float* row = of.row + of.radius;
  int32_t at = 0;
  for (; at + kFloats <= of.width; at += kFloats) store(row + at, load_bytes(from + at));
  for (; at < of.width; ++at) row[at] = static_cast<float>(from[at]);
  for (int k = 1; k <= of.radius; ++k) {
    row[-k] = row[k];
    row[of.width - 1 + k] = row[of.width - 1 - k];
  }
  for (int32_t x = 0; x < of.width; x += kBlurBlock) {
    Floats sums[kBlurVectors];
    blur_block(of, [&](int k) { return row + x + k; }, sums);
    for (int i = 0; i < kBlurVectors; ++i) store(to + x + i * kFloats, sums[i]);
  }
}

// `to`: a row of uint8, of which only `width` are written.
inline void blur_column(const Blur& of, int32_t y, uint8_t* to) {
  const float** rows = of.neighbours + of.radius;
  for (int k = -of.radius; k <= of.radius; ++k) {
    rows[k] = of.across + reflected(y + k, of.height) * blur_pitch(of.width);
  }
  for (int32_t x = 0; x < of.width; x += kBlurBlock) {
    Floats sums[kBlurVectors];
    blur_block(of, [&](int k) { return rows[k] + x; }, sums);
    uint8_t bytes[kBlurBlock];
    const bool is_whole = x + kBlurBlock <= of.width;
    for (int i = 0; i < kBlurVectors; ++i) {
      Floats value = clamped(Ops<Floats>::even(sums[i]), 255.0f);
      if (of.solarizes) value = solarized(value);
      store_bytes((is_whole ? to + x : bytes) + i * kFloats, value);
    }
    if (!is_whole) std::memcpy(to + x, bytes, static_cast<size_t>(of.width - x));
  }
}

inline void blur_plane(const Blur& of, uint8_t* plane) {
  const size_t pitch = blur_pitch(of.width), width = static_cast<size_t>(of.width);
  const auto height = static_cast<size_t>(of.height);
  for (size_t y = 0; y < height; ++y) blur_row(of, plane + y * width, of.across + y * pitch);
  for (int32_t y = 0; y < of.height; ++y) blur_column(of, y, plane + y * width);
}

}  // namespace
}  // namespace views
}  // namespace m3i
