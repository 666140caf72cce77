// views on the CPU: vectors of floats, for the arithmetic of arithmetic.h, and to and from bytes.
#pragma once

#include "m3i/cpu/vec.h"
#include "views/arithmetic.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace m3i {
namespace views {
namespace {

inline constexpr int kFloats = kLanes<float>;
using Floats = Vec<float, kFloats>;
using Ints = Vec<int32_t, kFloats>;

// Each operation rounds once: sources are compiled with -ffp-contract=off.
template <>
struct Ops<Floats> {
  static Floats all(float a) { return Floats{} + a; }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats div(Floats a, Floats b) { return a / b; }
#if M3I_VECTOR_BYTES == 64
  static __mmask16 equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static __mmask16 at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Floats choose(int of, Floats a, Floats b) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(of), b, a);
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats floor(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static Floats even(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
#elif M3I_VECTOR_BYTES == 32
  static Ints equal(Floats a, Floats b) { return a == b; }
  static Ints at_least(Floats a, Floats b) { return a >= b; }
  static Floats choose(Ints of, Floats a, Floats b) {
    return _mm256_blendv_ps(b, a, bit_cast<__m256>(of));
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats floor(Floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static Floats even(Floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#else
  static Ints equal(Floats a, Floats b) { return a == b; }
  static Ints at_least(Floats a, Floats b) { return a >= b; }
  static Floats choose(Ints of, Floats a, Floats b) { return of ? a : b; }
  static Floats fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < kFloats; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
  static Floats floor(Floats a) { return m3i::floor_of<float, kFloats>(a); }
  static Floats even(Floats a) {
    for (int i = 0; i < kFloats; ++i) a[i] = std::nearbyint(a[i]);
    return a;
  }
  static Floats least(Floats a, Floats b) { return a < b ? a : b; }
  static Floats most(Floats a, Floats b) { return a > b ? a : b; }
#endif
};

// By intrinsics: compilers convert vectors of bytes element by element.
inline Floats load_bytes(const uint8_t* from) {
#if M3I_VECTOR_BYTES == 64
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#elif M3I_VECTOR_BYTES == 32
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#else
  Floats values;
  for (int i = 0; i < kFloats; ++i) values[i] = static_cast<float>(from[i]);
  return values;
#endif
}

// Of whole numbers in [0, 255].
inline void store_bytes(uint8_t* to, Floats values) {
#if M3I_VECTOR_BYTES == 64
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(values));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#elif M3I_VECTOR_BYTES == 32
  const __m256i ints = _mm256_cvttps_epi32(values);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  const Ints ints = __builtin_convertvector(values, Ints);
  for (int i = 0; i < kFloats; ++i) to[i] = static_cast<uint8_t>(ints[i]);
#endif
}

}  // namespace
}  // namespace views
}  // namespace m3i
