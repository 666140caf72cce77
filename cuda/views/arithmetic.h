// views: the arithmetic of every step, the same for the CPU kernels and the device code.
//
// Equal bits everywhere rest on two rules. Sums of the resize are integers. Elsewhere every
// floating-point operation is rounded by itself: on a device by the intrinsics below, on a host by
// -ffp-contract=off, which sources that include this file are compiled with. Where torchvision's
// kernels fuse a product and a sum (add_ with alpha), fma_rn does so here.
#pragma once

#include "views/params.h"

#if !defined(__CUDA_ARCH__) && !defined(__CUDACC_RTC__)
#include <cmath>
#include <cstring>
#endif

namespace m3i {
namespace views {

// One axis of a resize, and the taps of one of its outputs: see Resize below.
struct ResizeAxis {
  int32_t input, output;  // pixels
  double scale;           // input / output
  double support;         // half of the filter's width, in input pixels
  double shrink;          // input pixels to the filter's argument
  int32_t max_taps;
  int32_t cubic;
};

struct ResizeTaps {
  int32_t first, count;
  double center;
};

namespace {  // each source has its own copy, of its instruction set

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

// The operations of a value's type: float here, vectors of them in cpu/lanes.h.
template <class F>
struct Ops;

template <>
struct Ops<float> {
  M3I_HOST_DEVICE static float all(float a) { return a; }
  M3I_HOST_DEVICE static float mul(float a, float b) { return mul_rn(a, b); }
  M3I_HOST_DEVICE static float add(float a, float b) { return add_rn(a, b); }
  M3I_HOST_DEVICE static float sub(float a, float b) { return sub_rn(a, b); }
  M3I_HOST_DEVICE static float div(float a, float b) { return div_rn(a, b); }
  M3I_HOST_DEVICE static float fma(float a, float b, float c) { return fma_rn(a, b, c); }
  M3I_HOST_DEVICE static float floor(float a) { return floor_of(a); }
  M3I_HOST_DEVICE static float even(float a) { return even_of(a); }
  M3I_HOST_DEVICE static float least(float a, float b) { return a < b ? a : b; }
  M3I_HOST_DEVICE static float most(float a, float b) { return a > b ? a : b; }
  M3I_HOST_DEVICE static bool equal(float a, float b) { return a == b; }
  M3I_HOST_DEVICE static bool at_least(float a, float b) { return a >= b; }
  M3I_HOST_DEVICE static float choose(bool of, float a, float b) { return of ? a : b; }
};

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

template <class F>
struct PixelOf {
  F r, g, b;
};
using Pixel = PixelOf<float>;

template <class F>
M3I_HOST_DEVICE inline F clamped(F value, float most) {
  return Ops<F>::least(Ops<F>::most(value, Ops<F>::all(0.0f)), Ops<F>::all(most));
}

// To [0, 255], then down to a whole number.
template <class F>
M3I_HOST_DEVICE inline F byte_of(F value) {
  return Ops<F>::floor(clamped(value, 255.0f));
}

template <class F>
M3I_HOST_DEVICE inline F gray_of(const PixelOf<F>& p) {
  using O = Ops<F>;
  const F red_green = O::fma(p.g, O::all(0.587f), O::mul(p.r, O::all(0.2989f)));
  return O::floor(O::fma(p.b, O::all(0.114f), red_green));
}

// value * factor + other * (1 - factor)
template <class F>
M3I_HOST_DEVICE inline F blend(F value, F other, float factor) {
  using O = Ops<F>;
  return byte_of(O::fma(other, O::all(sub_rn(1.0f, factor)), O::mul(value, O::all(factor))));
}

template <class F>
M3I_HOST_DEVICE inline F brightened(F value, float factor) {
  return byte_of(Ops<F>::mul(value, Ops<F>::all(factor)));
}

template <class F>
M3I_HOST_DEVICE inline F solarized(F value) {
  using O = Ops<F>;
  return O::choose(O::at_least(value, O::all(kSolarizeThreshold)), O::sub(O::all(255.0f), value),
                   value);
}

// Turns the hue, in HSV; a division, product or sum each where torchvision has one.
template <class F>
M3I_HOST_DEVICE inline PixelOf<F> hue_turned(const PixelOf<F>& pixel, float turns) {
  using O = Ops<F>;
  const F byte = O::all(1.0f / 255.0f), zero = O::all(0.0f), one = O::all(1.0f);
  const F r = O::mul(pixel.r, byte), g = O::mul(pixel.g, byte), b = O::mul(pixel.b, byte);
  const F v = O::most(r, O::most(g, b)), low = O::least(r, O::least(g, b));
  const auto is_gray = O::equal(v, low), is_r = O::equal(v, r), is_g = O::equal(v, g);
  const F range = O::sub(v, low);
  const F divisor = O::choose(is_gray, one, range);
  const F s = O::div(range, O::choose(is_gray, one, v));
  const F ahead = O::choose(is_r, b, O::choose(is_g, r, g));
  const F behind = O::choose(is_r, g, O::choose(is_g, b, r));
  const F sector = O::choose(is_r, zero, O::choose(is_g, O::all(2.0f), O::all(4.0f)));
  F h = O::add(O::div(O::sub(v, ahead), divisor), sector);
  h = O::sub(h, O::div(O::sub(v, behind), divisor));
  h = O::add(O::mul(h, O::all(1.0f / 6.0f)), one);
  h = O::sub(h, O::floor(h));
  h = O::add(h, O::all(turns));
  h = O::sub(h, O::floor(h));

  const F six = O::mul(h, O::all(6.0f));
  const F i = O::floor(six);  // the sector, 0 to 5, or 6 for 0
  const F part = O::mul(s, O::sub(six, i));
  const F rest = O::sub(one, s);
  // torchvision clamps these to [0, 1], where they are: v <= 1, s <= 1, and the fraction of h < 1
  const F p = O::mul(rest, v);
  const F q = O::mul(O::sub(one, part), v);
  const F t = O::mul(O::add(part, rest), v);
  const auto is_1 = O::equal(i, O::all(1.0f)), is_2 = O::equal(i, O::all(2.0f)),
             is_3 = O::equal(i, O::all(3.0f)), is_4 = O::equal(i, O::all(4.0f)),
             is_5 = O::equal(i, O::all(5.0f));
  const PixelOf<F> turned = {
      O::choose(is_1, q, O::choose(is_2 | is_3, p, O::choose(is_4, t, v))),
      O::choose(is_1 | is_2, v, O::choose(is_3, q, O::choose(is_4 | is_5, p, t))),
      O::choose(is_2, t, O::choose(is_3 | is_4, v, O::choose(is_5, q, p)))};
  const F back = O::all(255.999f);
  return {O::floor(O::mul(turned.r, back)), O::floor(O::mul(turned.g, back)),
          O::floor(O::mul(turned.b, back))};
}

// `mean`: of the view's gray, where step is kContrast.
template <class F>
M3I_HOST_DEVICE inline PixelOf<F> coloured(const PixelOf<F>& p, const ColourPlan& plan,
                                           int32_t step, float mean) {
  switch (step) {
    case kBrightness:
      return {brightened(p.r, plan.brightness), brightened(p.g, plan.brightness),
              brightened(p.b, plan.brightness)};
    case kContrast: {
      const F other = Ops<F>::all(mean);
      return {blend(p.r, other, plan.contrast), blend(p.g, other, plan.contrast),
              blend(p.b, other, plan.contrast)};
    }
    case kSaturation: {
      const F gray = gray_of(p);
      return {blend(p.r, gray, plan.saturation), blend(p.g, gray, plan.saturation),
              blend(p.b, gray, plan.saturation)};
    }
    case kHue:
      return hue_turned(p, plan.hue);
    case kGray: {
      const F gray = gray_of(p);
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

}  // namespace
}  // namespace views
}  // namespace m3i
