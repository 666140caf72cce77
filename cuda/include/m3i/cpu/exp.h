// Exponentials of the vectors in vec.h.
#pragma once

#include "m3i/cpu/vec.h"

#include <cmath>

namespace m3i {
namespace {

// exp of values up to 88, within 2 ulp; 0 below -87, NaN for NaN.
template <int kSize>
inline Vec<float, kSize> exp_of(Vec<float, kSize> value) {
  using Values = Vec<float, kSize>;
  using Bits = Vec<int32_t, kSize>;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
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

template <int kSize>
inline Vec<double, kSize> exp_of(Vec<double, kSize> value) {
  for (int i = 0; i < kSize; ++i) value[i] = std::exp(value[i]);
  return value;
}

// log(1 + value) of values from 0 to 1, within 2 ulp; NaN for NaN.
template <int kSize>
inline Vec<float, kSize> log1p_of(Vec<float, kSize> value) {
  using Values = Vec<float, kSize>;
  // 2 artanh(w), |w| <= 1/3: the next term of the series is below 2e-9.
  const Values w = value / (value + 2.0f);
  const Values square = w * w;
  Values sum = square * (1.0f / 15) + 1.0f / 13;
  sum = sum * square + 1.0f / 11;
  sum = sum * square + 1.0f / 9;
  sum = sum * square + 1.0f / 7;
  sum = sum * square + 1.0f / 5;
  sum = sum * square + 1.0f / 3;
  return 2.0f * (w + w * square * sum);
}

template <int kSize>
inline Vec<double, kSize> log1p_of(Vec<double, kSize> value) {
  for (int i = 0; i < kSize; ++i) value[i] = std::log1p(value[i]);
  return value;
}

}  // namespace
}  // namespace m3i
