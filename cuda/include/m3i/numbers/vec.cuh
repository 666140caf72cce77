// Vectors of elements that move through memory in one instruction, and their rounding. Device code
// only.
#pragma once

#include "m3i/numbers/bf16.h"
#include "m3i/numbers/f16.h"
#include "m3i/types.h"

namespace m3i {

// The widest access of one thread.
inline constexpr int kAccessBytes = 16;

// kSize elements (a power of two, 16 bytes at most), aligned so that they are loaded or stored at
// once.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  static_assert(sizeof(T) * kSize <= kAccessBytes, "one thread moves at most 16 bytes at once");
  T at[kSize];
};

namespace detail {

// The built-in type of a width. The intrinsics below take it and stay one access; a plain
// assignment of 16 bytes was seen split into four (nvcc 13.0, in the unrolled loops of mask_mix).
template <int kBytes>
struct Raw;
template <>
struct Raw<1> : Type<uint8_t> {};
template <>
struct Raw<2> : Type<uint16_t> {};
template <>
struct Raw<4> : Type<uint32_t> {};
template <>
struct Raw<8> : Type<uint2> {};
template <>
struct Raw<16> : Type<uint4> {};

}  // namespace detail

// `from` is aligned as Vec<T, kSize> is, and nobody writes there while the kernel runs (read-only
// cache).
template <int kSize, class T>
__device__ inline Vec<T, kSize> load(const T* from) {
  using Raw = typename detail::Raw<sizeof(T) * kSize>::type;
  const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
  Vec<T, kSize> result;
  memcpy(&result, &raw, sizeof(raw));
  return result;
}

// `to` is aligned as Vec<T, kSize> is.
template <class T, int kSize>
__device__ inline void store(T* to, const Vec<T, kSize>& value) {
  using Raw = typename detail::Raw<sizeof(T) * kSize>::type;
  Raw raw;
  memcpy(&raw, &value, sizeof(raw));
  __stwb(reinterpret_cast<Raw*>(to), raw);
}

// What elements are computed in.
template <class T>
struct AccumulatorOf : Type<float> {};
template <>
struct AccumulatorOf<double> : Type<double> {};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

namespace detail {

// The two 16-bit elements of a word.
__device__ inline void widen_pair(uint32_t word, BFloat16, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void widen_pair(uint32_t word, Float16, float& low, float& high) {
  unpack_f16x2(word, low, high);
}

__device__ inline uint32_t round_pair(BFloat16, float low, float high) {
  return pack_bf16x2(low, high);
}
__device__ inline uint32_t round_pair(Float16, float low, float high) {
  return pack_f16x2(low, high);
}

}  // namespace detail

// The elements in what they are computed in.
template <class T, int kSize>
__device__ inline void widen(const Vec<T, kSize>& vector, Accumulator<T> (&values)[kSize]) {
  if constexpr (sizeof(T) >= sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = vector.at[i];
  } else if constexpr (kSize == 1) {
    float nothing;
    detail::widen_pair(vector.at[0].bits, T{}, values[0], nothing);
  } else {
    uint32_t words[kSize / 2];
    memcpy(words, vector.at, sizeof(words));
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      detail::widen_pair(words[i / 2], T{}, values[i], values[i + 1]);
    }
  }
}

// Rounds to Out, to nearest even.
template <class Out, class In, int kSize>
__device__ inline Vec<Out, kSize> round_to(const In (&values)[kSize]) {
  Vec<Out, kSize> result;
  if constexpr (sizeof(Out) == sizeof(In)) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) result.at[i] = values[i];
  } else if constexpr (kSize == 1) {
    result.at[0].bits = static_cast<uint16_t>(detail::round_pair(Out{}, values[0], 0.0f));
  } else {
    uint32_t words[kSize / 2];
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      words[i / 2] = detail::round_pair(Out{}, values[i], values[i + 1]);
    }
    memcpy(result.at, words, sizeof(words));
  }
  return result;
}

// One element, in what it is computed in; read-only as in load().
template <class T>
__device__ inline Accumulator<T> load_value(const T* from) {
  Accumulator<T> value[1];
  widen(load<1>(from), value);
  return value[0];
}

// Rounds one value.
template <class T>
__device__ inline void store_value(T* to, Accumulator<T> value) {
  const Accumulator<T> values[1] = {value};
  store(to, round_to<T>(values));
}

}  // namespace m3i
