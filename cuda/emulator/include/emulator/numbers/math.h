// Device functions on numbers that C++ lacks. The fast ones are exact here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace m3i::emulator {

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// CUDA's float-to-integer conversions stay inside the integer's range, and NaN becomes 0.
template <class Int, class Float>
Int to_integer(Float value) {
  constexpr auto kLowest = static_cast<double>(std::numeric_limits<Int>::lowest());
  constexpr auto kHighest = static_cast<double>(std::numeric_limits<Int>::max());
  if (value != value) return 0;
  if (value <= kLowest) return std::numeric_limits<Int>::lowest();
  if (value >= kHighest) return std::numeric_limits<Int>::max();
  return static_cast<Int>(value);
}

}  // namespace m3i::emulator

// ---- Bits ---------------------------------------------------------------------------------------

inline int __float_as_int(float x) { return m3i::emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return m3i::emulator::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return m3i::emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return m3i::emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return m3i::emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return m3i::emulator::bits_as<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31u));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7u))) & 0xffu;
    if (choice & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

// ---- Integers -----------------------------------------------------------------------------------

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

#define M3I_EMULATOR_MIN_MAX(type)                             \
  constexpr type min(type a, type b) { return b < a ? b : a; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
M3I_EMULATOR_MIN_MAX(int)
M3I_EMULATOR_MIN_MAX(unsigned)
M3I_EMULATOR_MIN_MAX(long)
M3I_EMULATOR_MIN_MAX(unsigned long)
M3I_EMULATOR_MIN_MAX(long long)
M3I_EMULATOR_MIN_MAX(unsigned long long)
#undef M3I_EMULATOR_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// ---- Floating point -----------------------------------------------------------------------------

inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
// Rounded downwards: exact in double but for the last step, which an error of its own corrects.
inline float __fmaf_rd(float a, float b, float c) {
  const float nearest = std::fma(a, b, c);
  const double product = static_cast<double>(a) * b;  // of 24 bits each
  // nearest > product + c, without a rounding that could hide it
  const double above = static_cast<double>(nearest) - c;
  return above > product ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }

inline int __float2int_rz(float x) { return m3i::emulator::to_integer<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return m3i::emulator::to_integer<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return m3i::emulator::to_integer<int>(std::ceil(x)); }
inline int __float2int_rn(float x) { return m3i::emulator::to_integer<int>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) {
  return m3i::emulator::to_integer<unsigned>(std::trunc(x));
}
inline unsigned __float2uint_rn(float x) {
  return m3i::emulator::to_integer<unsigned>(std::nearbyint(x));
}
inline int __double2int_rd(double x) { return m3i::emulator::to_integer<int>(std::floor(x)); }
inline int __double2int_rz(double x) { return m3i::emulator::to_integer<int>(std::trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
