// Vectors of the instruction set that a source is compiled for, in the compiler's own vector types:
// one text for every set. Each source that includes it gets its own copy (nothing here has external
// linkage), or the linker could keep the AVX-512 copy of a function for all of them.
#pragma once

#include "m3i/types.h"

#include <cstring>
#include <type_traits>
#include <utility>

#if M3I_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

namespace m3i {
namespace {

// Bytes of one register, by the instruction set that the source is compiled for.
inline constexpr int kVectorBytes = M3I_VECTOR_BYTES;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kSize>
struct VecType {
  typedef T type __attribute__((vector_size(kSize * sizeof(T))));
};
template <class T, int kSize>
using Vec = typename VecType<T, kSize>::type;

// The integer of a floating-point type's width, which comparisons of vectors return.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// The type in which elements are computed.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- Memory, any alignment ----------------------------------------------------------------------

template <int kSize, class T>
inline Vec<T, kSize> load(const T* from) {
  Vec<T, kSize> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class V, class T>
inline void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// ---- Arithmetic ---------------------------------------------------------------------------------

template <int kSize, class T>
inline Vec<T, kSize> broadcast(T value) {
  return value - Vec<T, kSize>{};
}

// Towards minus infinity; the values fit the integer of their width.
template <class T, int kSize>
inline Vec<T, kSize> floor_of(Vec<T, kSize> value) {
#if M3I_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float> && kSize == 16) return _mm512_floor_ps(value);
  if constexpr (std::is_same_v<T, double> && kSize == 8) return _mm512_floor_pd(value);
#elif M3I_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float> && kSize == 8) return _mm256_floor_ps(value);
  if constexpr (std::is_same_v<T, double> && kSize == 4) return _mm256_floor_pd(value);
#endif
  const auto whole =
      __builtin_convertvector(__builtin_convertvector(value, Vec<IntOf<T>, kSize>), Vec<T, kSize>);
  return whole > value ? whole - 1 : whole;
}

// ---- Storage types ------------------------------------------------------------------------------

// Loads kSize elements, widened to the type in which they are computed.
template <int kSize, class T>
inline auto load_wide(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Vec<uint16_t, kSize> bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bit_cast<Vec<float, kSize>>(__builtin_convertvector(bits, Vec<uint32_t, kSize>) << 16);
#if M3I_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<T, Float16> && kSize == 16) {
    return static_cast<Vec<float, 16>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  } else if constexpr (std::is_same_v<T, Float16> && kSize == 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return static_cast<Vec<float, 8>>(
        _mm512_castps512_ps256(_mm512_cvtph_ps(_mm256_castsi128_si256(half))));
#endif
  } else if constexpr (std::is_same_v<T, Float16>) {
    using Bits = Vec<uint32_t, kSize>;
    Vec<uint16_t, kSize> half;
    std::memcpy(&half, from, sizeof(half));
    const Bits bits = __builtin_convertvector(half, Bits);
    const Bits magnitude = bits & 0x7fffu;
    // The exponent, seven bits short, is made up by a multiplication, which normalises subnormals.
    const auto scaled = bit_cast<Vec<float, kSize>>(magnitude << 13) * 0x1p112f;
    const Bits finite = bit_cast<Bits>(scaled);
    const Bits value = magnitude >= 0x7c00u ? finite | 0x7f800000u : finite;
    return bit_cast<Vec<float, kSize>>(value | (bits & 0x8000u) << 16);
  } else {
    return load<kSize>(from);
  }
}

template <int kSize>
inline Vec<uint32_t, kSize> bf16_bits_of(Vec<float, kSize> value) {
  const auto bits = bit_cast<Vec<uint32_t, kSize>>(value);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

template <int kSize>
inline Vec<uint32_t, kSize> fp16_bits_of(Vec<float, kSize> value) {
  using Bits = Vec<uint32_t, kSize>;
  const Bits bits = bit_cast<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal's units in the last places, rounded by the addition.
  const auto shifted = bit_cast<Vec<float, kSize>>(magnitude) + 0.5f;
  const Bits subnormal = bit_cast<Bits>(shifted) - 0x3f000000u;
  Bits half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;  // 65520 rounds to infinity
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  return half | (bits >> 16 & 0x8000u);
}

// Stores kSize elements, rounded to nearest even.
template <int kSize, class T>
inline void store_rounded(T* to, Vec<Accumulator<T>, kSize> value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    store(to, __builtin_convertvector(bf16_bits_of<kSize>(value), Vec<uint16_t, kSize>));
#if M3I_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<T, Float16> && kSize == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else if constexpr (std::is_same_v<T, Float16> && kSize == 8) {
    const __m256i half = _mm512_cvtps_ph(_mm512_castps256_ps512(value),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(half));
#endif
  } else if constexpr (std::is_same_v<T, Float16>) {
    store(to, __builtin_convertvector(fp16_bits_of<kSize>(value), Vec<uint16_t, kSize>));
  } else {
    store(to, value);
  }
}

// ---- Shuffles -----------------------------------------------------------------------------------

// Order{}(i): which element of a and b, counted through both, lands in place i.
template <class Order, class V, int... kIndices>
inline V shuffle(const V& a, const V& b, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(a, b, Order::at(kIndices)...);
}

template <template <int> class Order, class T, int kSize>
inline Vec<T, kSize> shuffle_by(const Vec<T, kSize>& a, const Vec<T, kSize>& b) {
  return shuffle<Order<kSize>>(a, b, std::make_integer_sequence<int, kSize>{});
}

template <int kSize>
struct Even {
  static constexpr int at(int i) { return 2 * i; }
};
template <int kSize>
struct Odd {
  static constexpr int at(int i) { return 2 * i + 1; }
};
// a0 b0 a1 b1 ...: the first half, and the second.
template <int kSize>
struct ZipLow {
  static constexpr int at(int i) { return i / 2 + i % 2 * kSize; }
};
template <int kSize>
struct ZipHigh {
  static constexpr int at(int i) { return kSize / 2 + i / 2 + i % 2 * kSize; }
};
// Within each four elements: a0 b0 a1 b1, and a2 b2 a3 b3.
template <int kSize>
struct QuadLow {
  static constexpr int at(int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kSize; }
};
template <int kSize>
struct QuadHigh {
  static constexpr int at(int i) { return QuadLow<kSize>::at(i) + 2; }
};
// Within each four elements: a0 a1 b0 b1, and a2 a3 b2 b3.
template <int kSize>
struct PairLow {
  static constexpr int at(int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kSize; }
};
template <int kSize>
struct PairHigh {
  static constexpr int at(int i) { return PairLow<kSize>::at(i) + 2; }
};

template <int kFirst, class V, int... kIndices>
inline auto slice(const V& vector, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(vector, vector, kFirst + kIndices...);
}

// The upper half added to the lower, until four elements are left.
template <class T, int kSize>
inline Vec<T, 4> fold(const Vec<T, kSize>& vector) {
  if constexpr (kSize == 4) {
    return vector;
  } else {
    constexpr auto kHalf = std::make_integer_sequence<int, kSize / 2>{};
    return fold<T, kSize / 2>(slice<0>(vector, kHalf) + slice<kSize / 2>(vector, kHalf));
  }
}

template <class T, int kSize>
inline T sum_of(const Vec<T, kSize>& vector) {
  if constexpr (kSize == 2) {
    return vector[0] + vector[1];
  } else {
    const auto four = fold<T, kSize>(vector);
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
}

// Of each four elements of a, b, c, d their sums, in this order; what is left is to add the fours.
template <class T, int kSize>
inline Vec<T, kSize> quads_of(const Vec<T, kSize>& a, const Vec<T, kSize>& b,
                              const Vec<T, kSize>& c, const Vec<T, kSize>& d) {
  const auto ab = shuffle_by<QuadLow, T, kSize>(a, b) + shuffle_by<QuadHigh, T, kSize>(a, b);
  const auto cd = shuffle_by<QuadLow, T, kSize>(c, d) + shuffle_by<QuadHigh, T, kSize>(c, d);
  return shuffle_by<PairLow, T, kSize>(ab, cd) + shuffle_by<PairHigh, T, kSize>(ab, cd);
}

// Fours of two vectors, in order: those with an even number, and those with an odd one.
template <int kSize>
struct EvenFours {
  static constexpr int at(int i) { return i / 4 * 8 + i % 4; }
};
template <int kSize>
struct OddFours {
  static constexpr int at(int i) { return i / 4 * 8 + 4 + i % 4; }
};

template <class T, int kSize>
inline Vec<T, kSize> halve_fours(const Vec<T, kSize>& a, const Vec<T, kSize>& b) {
  return shuffle_by<EvenFours, T, kSize>(a, b) + shuffle_by<OddFours, T, kSize>(a, b);
}

// The sums of the fours of each of kSize / 4 vectors.
template <class T, int kSize>
inline Vec<T, kSize> join(const Vec<T, kSize>* vectors) {
  if constexpr (kSize == 4) {
    return vectors[0];
  } else if constexpr (kSize == 8) {
    return halve_fours<T, kSize>(vectors[0], vectors[1]);
  } else {
    static_assert(kSize == 16);
    return halve_fours<T, kSize>(halve_fours<T, kSize>(vectors[0], vectors[1]),
                                 halve_fours<T, kSize>(vectors[2], vectors[3]));
  }
}

}  // namespace
}  // namespace m3i
