// The 16-bit formats by their bits, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace m3i::emulator {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float bfloat16_to_float(uint16_t bits) { return float_of_bits(uint32_t{bits} << 16); }

// A tf32, of which the hardware reads the upper 19 bits.
inline float tf32_to_float(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Rounded once: to a float first, away from the ties that are none, and to odd where it is inexact.
inline uint16_t double_to_bfloat16(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(value) || std::isinf(nearest)) {
    return float_to_bfloat16(nearest);
  }
  const bool too_far = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  const uint32_t towards_zero = bits_of_float(nearest) - (too_far ? 1u : 0u);
  return float_to_bfloat16(float_of_bits(towards_zero | 1u));
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = bits >> 10 & 0x1fu;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // fraction * 2^-24, exactly
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

// From double, so that a conversion from double rounds once.
inline uint16_t double_to_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520.0) return sign | 0x7c00;  // half way to the next power of two
  // Units of the last place: 2^-24 below the normal numbers
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // A carry out of the fraction goes to the exponent, as it should.
  const uint32_t biased = unit == -24 ? 0 : static_cast<uint32_t>(unit + 24);
  return static_cast<uint16_t>(sign | ((biased << 10) + units));
}

inline uint16_t float_to_half(float value) { return double_to_half(static_cast<double>(value)); }

}  // namespace m3i::emulator
