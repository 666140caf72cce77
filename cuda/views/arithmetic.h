// views: the arithmetic of every step, the same for the CPU kernels and the device code.
//
// Equal bits everywhere rest on two rules. Sums of the resize are integers. Elsewhere every
// floating-point operation is rounded by itself: on a device by the intrinsics below, on a host by
// -ffp-contract=off, which sources that include this file are compiled with. Where torchvision's
// kernels fuse a product and a sum (add_ with alpha), fma_rn does so here.
#pragma once

#include "views/params.h"

#ifndef __CUDA_ARCH__
#include <cmath>
#include <cstring>
#endif

namespace m3i {
namespace views {

// ---- Operations, each rounded once --------------------------------------------------------------

#ifdef __CUDA_ARCH__
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub_rn(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double sub_rn(double a, double b) { return __dsub_rn(a, b); }
__device__ inline double div_rn(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline float floor_of(float a) { return floorf(a); }
__device__ inline float even_of(float a) { return rintf(a); }
__device__ inline double power_of_two(int n) {
  return __longlong_as_double(static_cast<long long>(n + 1023) << 52);
}
#else
M3I_HOST_DEVICE inline float mul_rn(float a, float b) { return a * b; }
M3I_HOST_DEVICE inline float add_rn(float a, float b) { return a + b; }
M3I_HOST_DEVICE inline float sub_rn(float a, float b) { return a - b; }
M3I_HOST_DEVICE inline float div_rn(float a, float b) { return a / b; }
M3I_HOST_DEVICE inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
M3I_HOST_DEVICE inline double mul_rn(double a, double b) { return a * b; }
M3I_HOST_DEVICE inline double add_rn(double a, double b) { return a + b; }
M3I_HOST_DEVICE inline double sub_rn(double a, double b) { return a - b; }
M3I_HOST_DEVICE inline double div_rn(double a, double b) { return a / b; }
M3I_HOST_DEVICE inline float floor_of(float a) { return std::floor(a); }
M3I_HOST_DEVICE inline float even_of(float a) { return std::nearbyint(a); }
M3I_HOST_DEVICE inline double power_of_two(int n) {
  const uint64_t bits = static_cast<uint64_t>(n + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
#endif

// e^x for x <= 1, to an ulp or two; from products and sums alone, so that every machine has the
// same bits.
M3I_HOST_DEVICE inline double exp_of(double x) {
  if (x < -700.0) return 0.0;
  const double quotient = mul_rn(x, 1.4426950408889634);
  const int n = static_cast<int>(quotient < 0 ? quotient - 0.5 : quotient + 0.5);
  const double whole = n;
  double rest = sub_rn(x, mul_rn(whole, 0.6931471803691238));  // ln 2, its upper 33 bits
  rest = sub_rn(rest, mul_rn(whole, 1.9082149292705877e-10));  // and what they leave
  double sum = 1.0;
  for (int k = 13; k > 0; --k) sum = add_rn(1.0, mul_rn(div_rn(rest, k), sum));
  return mul_rn(sum, power_of_two(n));
}

// ---- Resize -------------------------------------------------------------------------------------
//
// Output i is the sum of `count` input pixels from `first` on, with weights of int16: the filter's
// values in double, divided by their sum, times 2^precision. precision is the greatest at which the
// largest weight of the axis fits int16, but at most 22 (torch's uint8 path, and so the same bits).
// The horizontal pass comes first; between the passes values are rounded to uint8.

struct ResizeAxis {
  int32_t input, output;  // pixels
  double scale;           // input / output
  double support;         // half of the filter's width, in input pixels
  double shrink;          // input pixels to the filter's argument
  int32_t max_taps;
  int32_t cubic;
};

M3I_HOST_DEVICE inline ResizeAxis resize_axis(int32_t input, int32_t output, int32_t cubic) {
  ResizeAxis axis;
  axis.input = input;
  axis.output = output;
  axis.cubic = cubic;
  axis.scale = div_rn(static_cast<double>(input), static_cast<double>(output));
  const double half = cubic ? 2.0 : 1.0;
  axis.support = axis.scale >= 1.0 ? mul_rn(half, axis.scale) : half;
  axis.shrink = axis.scale >= 1.0 ? div_rn(1.0, axis.scale) : 1.0;
  const int32_t whole = static_cast<int32_t>(axis.support);
  axis.max_taps = 2 * (axis.support > whole ? whole + 1 : whole) + 1;
  return axis;
}

struct ResizeTaps {
  int32_t first, count;
  double center;
};

M3I_HOST_DEVICE inline ResizeTaps resize_taps(const ResizeAxis& axis, int32_t i) {
  ResizeTaps taps;
  taps.center = mul_rn(axis.scale, i + 0.5);
  const double low = add_rn(sub_rn(taps.center, axis.support), 0.5);
  const int32_t high = static_cast<int32_t>(add_rn(add_rn(taps.center, axis.support), 0.5));
  taps.first = low > 0 ? static_cast<int32_t>(low) : 0;
  taps.count = (high < axis.input ? high : axis.input) - taps.first;
  if (taps.count > axis.max_taps) taps.count = axis.max_taps;
  return taps;
}

// The filter's value at tap j, not yet divided by the sum of all.
M3I_HOST_DEVICE inline double resize_value(const ResizeAxis& axis, const ResizeTaps& taps,
                                           int32_t j) {
  const double at = add_rn(sub_rn(static_cast<double>(j + taps.first), taps.center), 0.5);
  double x = mul_rn(at, axis.shrink);
  x = x < 0 ? -x : x;
  if (!axis.cubic) return x < 1.0 ? sub_rn(1.0, x) : 0.0;
  constexpr double kA = -0.5;
  if (x < 1.0) {
    const double inner = sub_rn(mul_rn(kA + 2.0, x), kA + 3.0);
    return add_rn(mul_rn(mul_rn(inner, x), x), 1.0);
  }
  if (x < 2.0) {
    const double inner = add_rn(mul_rn(sub_rn(mul_rn(kA, x), 5.0 * kA), x), 8.0 * kA);
    return sub_rn(mul_rn(inner, x), 4.0 * kA);
  }
  return 0.0;
}

// `largest`: of all divided weights of the axis.
M3I_HOST_DEVICE inline int resize_precision(double largest) {
  int precision = 0;
  while (precision < 22 && static_cast<int>(add_rn(0.5, mul_rn(largest, 2 << precision))) < 1 << 15)
    ++precision;
  return precision;
}

M3I_HOST_DEVICE inline int resize_weight(double weight, int precision) {
  const double value = mul_rn(weight, 1 << precision);
  return static_cast<int>(value < 0 ? sub_rn(value, 0.5) : add_rn(value, 0.5));
}

// A sum of pixels times weights, which begins at 1 << (precision - 1), as uint8.
M3I_HOST_DEVICE inline int resize_rounded(int32_t sum, int precision) {
  const int32_t value = sum >> precision;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

// ---- Colours ------------------------------------------------------------------------------------
//
// Between steps a pixel is three whole numbers in [0, 255], kept as float.

enum ColourStep : int32_t { kBrightness, kContrast, kSaturation, kHue, kGray, kSolarize };

// The steps of a view that change anything, in order. Solarize follows the blur, if there is one.
struct ColourPlan {
  int32_t count;
  int32_t contrast_at;  // of the steps, or count where there is no contrast
  int32_t step[6];
  float brightness, contrast, saturation, hue;
};

M3I_HOST_DEVICE inline ColourPlan colour_plan(const ViewParams& params) {
  ColourPlan plan = {0, -1, {}, params.brightness, params.contrast, params.saturation, params.hue};
  int32_t left[4] = {kBrightness, kContrast, kSaturation, kHue};
  int32_t code = static_cast<int32_t>(params.order);
  const bool changes[4] = {params.brightness != 1, params.contrast != 1, params.saturation != 1,
                           params.hue != 0};
  for (int32_t places = 4, block = 6; places > 0; --places) {
    const int32_t at = code / block;
    code %= block;
    block = places > 1 ? block / (places - 1) : 1;
    const int32_t step = left[at];
    for (int32_t k = at; k + 1 < places; ++k) left[k] = left[k + 1];
    if (!changes[step]) continue;
    if (step == kContrast) plan.contrast_at = plan.count;
    plan.step[plan.count++] = step;
  }
  if (params.gray != 0) plan.step[plan.count++] = kGray;
  if (params.solarize != 0 && params.sigma == 0) plan.step[plan.count++] = kSolarize;
  if (plan.contrast_at < 0) plan.contrast_at = plan.count;
  return plan;
}

// Of a view's gray, the mean about which contrast changes.
M3I_HOST_DEVICE inline float gray_mean(int64_t sum, int64_t count) {
  return div_rn(static_cast<float>(sum), static_cast<float>(count));
}

struct Pixel {
  float r, g, b;
};

// Down to a whole number: values are not negative.
M3I_HOST_DEVICE inline float whole_of(float value) { return floor_of(value); }

M3I_HOST_DEVICE inline float clamped(float value, float most) {
  return value < 0 ? 0 : value > most ? most : value;
}

M3I_HOST_DEVICE inline float gray_of(const Pixel& p) {
  return whole_of(fma_rn(p.b, 0.114f, fma_rn(p.g, 0.587f, mul_rn(p.r, 0.2989f))));
}

// value * factor + other * (1 - factor)
M3I_HOST_DEVICE inline float blend(float value, float other, float factor) {
  return whole_of(clamped(fma_rn(other, sub_rn(1.0f, factor), mul_rn(value, factor)), 255.0f));
}

M3I_HOST_DEVICE inline float brightened(float value, float factor) {
  return whole_of(clamped(mul_rn(value, factor), 255.0f));
}

M3I_HOST_DEVICE inline float solarized(float value) {
  return value >= kSolarizeThreshold ? 255.0f - value : value;
}

// Turns the hue, in HSV; a division, product or sum each where torchvision has one.
M3I_HOST_DEVICE inline Pixel hue_turned(const Pixel& pixel, float turns) {
  constexpr float kByte = 1.0f / 255.0f;
  const float r = mul_rn(pixel.r, kByte), g = mul_rn(pixel.g, kByte), b = mul_rn(pixel.b, kByte);
  const float most = r > g ? (r > b ? r : b) : (g > b ? g : b);
  const float least = r < g ? (r < b ? r : b) : (g < b ? g : b);
  const bool is_gray = most == least;
  const float range = sub_rn(most, least);
  const float divisor = is_gray ? 1.0f : range;
  const float s = div_rn(range, is_gray ? 1.0f : most);
  const bool is_r = most == r, is_g = most == g;
  const float ahead = is_r ? b : is_g ? r : g;
  const float behind = is_r ? g : is_g ? b : r;
  const float sector = is_r ? 0.0f : is_g ? 2.0f : 4.0f;
  float h = sub_rn(add_rn(div_rn(sub_rn(most, ahead), divisor), sector),
                   div_rn(sub_rn(most, behind), divisor));
  h = add_rn(mul_rn(h, 1.0f / 6.0f), 1.0f);
  h = sub_rn(h, floor_of(h));
  h = add_rn(h, turns);
  h = sub_rn(h, floor_of(h));

  const float six = mul_rn(h, 6.0f);
  const float floor = floor_of(six);
  const float part = mul_rn(s, sub_rn(six, floor));
  const float rest = sub_rn(1.0f, s);
  const float p = clamped(mul_rn(rest, most), 1.0f);
  const float q = clamped(mul_rn(sub_rn(1.0f, part), most), 1.0f);
  const float t = clamped(mul_rn(add_rn(part, rest), most), 1.0f);
  const int32_t i = floor >= 6 ? 0 : static_cast<int32_t>(floor);
  const Pixel turned = {i == 0 || i == 5   ? most
                        : i == 1           ? q
                        : i == 2 || i == 3 ? p
                                           : t,
                        i == 1 || i == 2 ? most
                        : i == 0         ? t
                        : i == 3         ? q
                                         : p,
                        i == 3 || i == 4 ? most
                        : i == 2         ? t
                        : i == 5         ? q
                                         : p};
  constexpr float kBack = 255.999f;
  return {whole_of(mul_rn(turned.r, kBack)), whole_of(mul_rn(turned.g, kBack)),
          whole_of(mul_rn(turned.b, kBack))};
}

// `mean`: of the view's gray, where step is kContrast.
M3I_HOST_DEVICE inline Pixel coloured(const Pixel& p, const ColourPlan& plan, int32_t step,
                                      float mean) {
  switch (step) {
    case kBrightness:
      return {brightened(p.r, plan.brightness), brightened(p.g, plan.brightness),
              brightened(p.b, plan.brightness)};
    case kContrast:
      return {blend(p.r, mean, plan.contrast), blend(p.g, mean, plan.contrast),
              blend(p.b, mean, plan.contrast)};
    case kSaturation: {
      const float gray = gray_of(p);
      return {blend(p.r, gray, plan.saturation), blend(p.g, gray, plan.saturation),
              blend(p.b, gray, plan.saturation)};
    }
    case kHue:
      return hue_turned(p, plan.hue);
    case kGray: {
      const float gray = gray_of(p);
      return {gray, gray, gray};
    }
    default:
      return {solarized(p.r), solarized(p.g), solarized(p.b)};
  }
}

// ---- Blur ---------------------------------------------------------------------------------------
//
// Rows first, then columns, both in fp32 without rounding between; pixel by pixel
//
//   sum = weight[0] * x[0];  sum = fma(weight[k], x[-k] + x[k], sum) for k = 1 .. radius
//
// and then to the nearest even whole number. Pixels past an edge are reflected, the edge itself not
// repeated.

// Weights of the kernel below this are left out, if all further ones are too: together they move a
// pixel by less than a thousandth of a level.
inline constexpr double kBlurLeast = 0x1p-22;

// Writes the weights of 0 .. blur_kernel_size / 2 pixels from the centre, and returns the last of
// them that counts. They are those of the whole kernel, divided by the sum of all.
M3I_HOST_DEVICE inline int blur_weights(float sigma, int blur_kernel_size, float* weights) {
  const int half = blur_kernel_size / 2;
  const double rate = div_rn(-0.5, mul_rn(static_cast<double>(sigma), static_cast<double>(sigma)));
  double sum = 1.0;
  for (int k = 1; k <= half; ++k) {
    sum = add_rn(sum, 2.0 * exp_of(mul_rn(rate, static_cast<double>(k) * k)));
  }
  int radius = 0;
  for (int k = 0; k <= half; ++k) {
    const double weight = div_rn(exp_of(mul_rn(rate, static_cast<double>(k) * k)), sum);
    weights[k] = static_cast<float>(weight);
    if (weight >= kBlurLeast) radius = k;
  }
  return radius;
}

// The place of the pixel that stands at `at`, which is at most one reflection away.
M3I_HOST_DEVICE inline int reflected(int at, int size) {
  return at < 0 ? -at : at >= size ? 2 * (size - 1) - at : at;
}

}  // namespace views
}  // namespace m3i
