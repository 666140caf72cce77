// Vectors of elements that move through memory in one instruction, and their rounding. Device code
// only.
#pragma once

#include "m3i/bf16.h"
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

// Rounds to Out, to nearest even.
template <class Out, int kSize>
__device__ inline Vec<Out, kSize> round_to(const float (&values)[kSize]) {
  Vec<Out, kSize> result;
  if constexpr (sizeof(Out) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) result.at[i] = values[i];
  } else if constexpr (kSize == 1) {
    result.at[0].bits = static_cast<uint16_t>(pack_bf16x2(values[0], 0.0f));
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      const uint32_t packed = pack_bf16x2(values[i], values[i + 1]);
      result.at[i].bits = static_cast<uint16_t>(packed);
      result.at[i + 1].bits = static_cast<uint16_t>(packed >> 16);
    }
  }
  return result;
}

}  // namespace m3i
