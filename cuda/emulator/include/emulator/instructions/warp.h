// Shuffles, votes, matches and reductions of a warp.
#pragma once

#include "emulator/runtime.h"

#include <cstring>
#include <type_traits>

// A mask names the lanes that take part; the caller is one of them, and each of them that has not
// returned has to make the call. Only __syncwarp orders memory.
inline void __syncwarp(unsigned mask = 0xffffffffu, M3I_EMULATOR_SITE) {
  m3i::emulator::warp_barrier(mask, site);
}

// The calling lane alone, the smallest mask that a GPU may return, since it need not converge any
// lanes of a warp.
inline unsigned __activemask() { return m3i::emulator::lane_bit(); }

inline unsigned __ballot_sync(unsigned mask, int predicate, M3I_EMULATOR_SITE) {
  return m3i::emulator::ballot(mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, M3I_EMULATOR_SITE) {
  return m3i::emulator::ballot(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, M3I_EMULATOR_SITE) {
  return m3i::emulator::ballot(mask, !predicate, site) == 0;
}

namespace m3i::emulator {

// CUDA's shuffles take numbers of four and eight bytes, and pairs of 16-bit ones.
template <class T>
uint64_t to_word(T value) {
  static_assert(
      std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2),
      "no shuffle of this type");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace m3i::emulator

#define M3I_EMULATOR_SHUFFLE(name, kind, operand)                                                  \
  template <class T>                                                                               \
  T name(unsigned mask, T value, operand, int width = 32, M3I_EMULATOR_SITE) {                     \
    return m3i::emulator::from_word<T>(m3i::emulator::shuffle(m3i::emulator::Shuffle::kind, mask,  \
                                                              m3i::emulator::to_word(value),       \
                                                              static_cast<int>(by), width, site)); \
  }

M3I_EMULATOR_SHUFFLE(__shfl_sync, kIndex, int by)
M3I_EMULATOR_SHUFFLE(__shfl_up_sync, kUp, unsigned by)
M3I_EMULATOR_SHUFFLE(__shfl_down_sync, kDown, unsigned by)
M3I_EMULATOR_SHUFFLE(__shfl_xor_sync, kXor, int by)
#undef M3I_EMULATOR_SHUFFLE

template <class T>
unsigned __match_any_sync(unsigned mask, T value, M3I_EMULATOR_SITE) {
  return m3i::emulator::match_any(mask, m3i::emulator::to_word(value), site);
}
// The mask if all values are equal, else 0.
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* equal, M3I_EMULATOR_SITE) {
  const unsigned lanes = m3i::emulator::ballot(mask, true, site);
  *equal = m3i::emulator::match_any(mask, m3i::emulator::to_word(value), site) == lanes;
  return *equal ? mask : 0u;
}

// compute capability 8.0 and later
#define M3I_EMULATOR_REDUCE(name, type, kind)                                            \
  inline type name(unsigned mask, type value, M3I_EMULATOR_SITE) {                       \
    return static_cast<type>(m3i::emulator::reduce(m3i::emulator::Reduction::kind, mask, \
                                                   static_cast<uint32_t>(value), site)); \
  }
M3I_EMULATOR_REDUCE(__reduce_add_sync, unsigned, kAdd)
M3I_EMULATOR_REDUCE(__reduce_add_sync, int, kAdd)
M3I_EMULATOR_REDUCE(__reduce_min_sync, unsigned, kMin)
M3I_EMULATOR_REDUCE(__reduce_min_sync, int, kSignedMin)
M3I_EMULATOR_REDUCE(__reduce_max_sync, unsigned, kMax)
M3I_EMULATOR_REDUCE(__reduce_max_sync, int, kSignedMax)
M3I_EMULATOR_REDUCE(__reduce_and_sync, unsigned, kAnd)
M3I_EMULATOR_REDUCE(__reduce_or_sync, unsigned, kOr)
M3I_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef M3I_EMULATOR_REDUCE
