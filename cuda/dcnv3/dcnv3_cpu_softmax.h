// dcnv3 on the CPU: the softmax over the points of each pixel, and its gradient.
#pragma once

#include "m3i/cpu_vec.h"

#include <cmath>

namespace m3i {
namespace {

// exp of values that are not positive, to 2 ulp; below -87 it is 0, NaN stays NaN.
template <int kSize>
inline Vec<float, kSize> exp_of(Vec<float, kSize> value) {
  using Values = Vec<float, kSize>;
  using Bits = Vec<int32_t, kSize>;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the last places
  constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
  const auto vanishes = value < -87.0f;
  const Values clamped = vanishes ? Values{} : value;
  const Values shifted = clamped * 0x1.715476p0f + kRound;
  const Values power = shifted - kRound;
  const Values rest = (clamped - power * kLn2High) - power * kLn2Low;  // |rest| <= ln(2) / 2
  // Taylor's series: its next term is below 6e-9.
  Values sum = rest * (1.0f / 5040) + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<int32_t>(kRound) + 127;
  return vanishes ? Values{} : sum * bit_cast<Values>(exponent << 23);
}

inline void exp_all(int64_t count, float* values) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    store(values + i, exp_of<kLanes<float>>(load<kLanes<float>>(values + i)));
  }
}

inline void exp_all(int64_t count, double* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = std::exp(values[i]);
}

// Logits to weights. The array has room up to a whole vector.
template <class A>
void softmax(int64_t num_pixels, int64_t num_points, A* values) {
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    A* logits = values + pixel * num_points;
    A largest = logits[0];
    for (int64_t k = 1; k < num_points; ++k) largest = logits[k] > largest ? logits[k] : largest;
    for (int64_t k = 0; k < num_points; ++k) logits[k] -= largest;
  }
  exp_all(num_pixels * num_points, values);
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    A* weights = values + pixel * num_points;
    A sum = 0;
    for (int64_t k = 0; k < num_points; ++k) sum += weights[k];
    for (int64_t k = 0; k < num_points; ++k) weights[k] /= sum;
  }
}

// Gradients by weights to gradients by logits.
template <class A>
void softmax_bwd(int64_t num_pixels, int64_t num_points, const A* weights, A* grads) {
  for (int64_t pixel = 0; pixel < num_pixels; ++pixel) {
    const A* weight = weights + pixel * num_points;
    A* grad = grads + pixel * num_points;
    A mean = 0;
    for (int64_t k = 0; k < num_points; ++k) mean += weight[k] * grad[k];
    for (int64_t k = 0; k < num_points; ++k) grad[k] = weight[k] * (grad[k] - mean);
  }
}

}  // namespace
}  // namespace m3i
