// views: Philox-4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC11).
//
// Random numbers are a pure function of a key and a counter: no state, no order of draws.
#pragma once

#include "m3i/types.h"

namespace m3i {

struct PhiloxWords {
  uint32_t word[4];
};

namespace detail {

inline uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

}  // namespace detail

// The four words of a counter under a key, after ten rounds.
inline PhiloxWords philox(PhiloxWords counter, uint32_t key_low, uint32_t key_high) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const uint32_t* c = counter.word;
    counter = {{detail::high_product(kMultiplier1, c[2]) ^ c[1] ^ key_low, kMultiplier1 * c[2],
                detail::high_product(kMultiplier0, c[0]) ^ c[3] ^ key_high, kMultiplier0 * c[0]}};
    key_low += kWeyl0;
    key_high += kWeyl1;
  }
  return counter;
}

// Uniform in [0, 1): the upper 24 bits of a word.
inline float uniform_of(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// A whole number in [0, count), each as likely as another to 2^-32.
inline int64_t below(uint32_t word, int64_t count) {
  return static_cast<int64_t>(static_cast<uint64_t>(word) * static_cast<uint64_t>(count) >> 32);
}

}  // namespace m3i
