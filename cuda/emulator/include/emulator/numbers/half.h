// Floating-point numbers that are stored in 16 bits and computed in float.
#pragma once

#include "emulator/instructions/atomics.h"
#include "emulator/numbers/numbers.h"
#include "emulator/numbers/vector_types.h"

#include <cmath>

namespace m3i::emulator {

struct HalfFormat {
  static float to_float(uint16_t bits) { return half_to_float(bits); }
  static uint16_t from_double(double value) { return double_to_half(value); }
};

struct BFloat16Format {
  static float to_float(uint16_t bits) { return bfloat16_to_float(bits); }
  static uint16_t from_double(double value) { return double_to_bfloat16(value); }
};

template <class Format>
struct alignas(2) Small {
  uint16_t bits;

  Small() = default;
  Small(float value) : bits(Format::from_double(static_cast<double>(value))) {}
  Small(double value) : bits(Format::from_double(value)) {}
  Small(int value) : bits(Format::from_double(value)) {}
  operator float() const { return Format::to_float(bits); }

  Small& operator+=(Small other) { return *this = *this + other; }
  Small& operator-=(Small other) { return *this = *this - other; }
  Small& operator*=(Small other) { return *this = *this * other; }
  Small& operator/=(Small other) { return *this = *this / other; }

  // A float holds the exact sum, difference and product of two of either format, or rounds it so
  // that rounding again gives what one rounding would (24 bits are at least 2 * 11 + 2).
  friend Small operator+(Small a, Small b) { return float(a) + float(b); }
  friend Small operator-(Small a, Small b) { return float(a) - float(b); }
  friend Small operator*(Small a, Small b) { return float(a) * float(b); }
  friend Small operator/(Small a, Small b) { return float(a) / float(b); }
  friend Small operator-(Small a) { return -float(a); }
};

template <class T>
struct alignas(4) SmallPair {
  T x, y;
};

}  // namespace m3i::emulator

template <class Format>
m3i::emulator::Small<Format> __hfma(m3i::emulator::Small<Format> a, m3i::emulator::Small<Format> b,
                                    m3i::emulator::Small<Format> c) {
  return std::fma(double(float(a)), double(float(b)), double(float(c)));
}

template <class Format>
__attribute__((always_inline)) inline m3i::emulator::Small<Format> atomicAdd(
    m3i::emulator::Small<Format>* at, m3i::emulator::Small<Format> value) {
  return m3i::emulator::update(at,
                               [&](m3i::emulator::Small<Format> before) { return before + value; });
}

template <class T>
__attribute__((always_inline)) inline m3i::emulator::SmallPair<T> atomicAdd(
    m3i::emulator::SmallPair<T>* at, m3i::emulator::SmallPair<T> value) {
  return m3i::emulator::update(at, [&](m3i::emulator::SmallPair<T> before) {
    return m3i::emulator::SmallPair<T>{before.x + value.x, before.y + value.y};
  });
}
