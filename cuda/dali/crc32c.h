// CRC-32C (Castagnoli), the checksum of a sample's bytes in the table of a data set.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace m3i {
namespace crc32c_detail {

constexpr uint32_t kPolynomial = 0x82f63b78;  // of 0x1edc6f41, bits reversed

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ (rest & 1 ? kPolynomial : 0);
    table[byte] = rest;
  }
  return table;
}

inline uint32_t by_table(uint32_t crc, const uint8_t* bytes, size_t size) {
  static constexpr std::array<uint32_t, 256> kTable = make_table();
  for (size_t i = 0; i < size; ++i) crc = (crc >> 8) ^ kTable[(crc ^ bytes[i]) & 0xff];
  return crc;
}

#if defined(__x86_64__)
// Bytes of each of the three chains of by_instruction.
constexpr size_t kChunk = 1024;

// What kChunk bytes of zero make of a checksum, by each of its bytes.
class AfterZeros {
 public:
  AfterZeros() {
    static constexpr uint8_t kZeros[kChunk] = {};
    for (uint32_t bit = 1; bit != 0; bit <<= 1) {  // a linear map: of the bits one by one
      const uint32_t after = by_table(bit, kZeros, kChunk);
      for (uint32_t value = 0; value < 256; ++value) {
        for (int byte = 0; byte < 4; ++byte) {
          if (value << 8 * byte & bit) of_[byte][value] ^= after;
        }
      }
    }
  }
  uint32_t operator()(uint32_t crc) const {
    return of_[0][crc & 0xff] ^ of_[1][crc >> 8 & 0xff] ^ of_[2][crc >> 16 & 0xff] ^
           of_[3][crc >> 24];
  }

 private:
  uint32_t of_[4][256] = {};
};

__attribute__((target("sse4.2"))) inline uint64_t next_crc(uint64_t crc, const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return _mm_crc32_u64(crc, word);
}

// An instruction takes 8 bytes and waits 3 cycles for the one before: three chains side by side.
__attribute__((target("sse4.2"))) inline uint32_t by_instruction(uint32_t crc, const uint8_t* bytes,
                                                                 size_t size) {
  static const AfterZeros after_zeros;
  for (; size >= 3 * kChunk; size -= 3 * kChunk, bytes += 3 * kChunk) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kChunk; i += 8) {
      a = next_crc(a, bytes + i);
      b = next_crc(b, bytes + kChunk + i);
      c = next_crc(c, bytes + 2 * kChunk + i);
    }
    const uint32_t ab = after_zeros(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    crc = after_zeros(ab) ^ static_cast<uint32_t>(c);
  }
  uint64_t wide = crc;
  for (; size >= 8; size -= 8, bytes += 8) wide = next_crc(wide, bytes);
  crc = static_cast<uint32_t>(wide);
  for (; size > 0; --size, ++bytes) crc = _mm_crc32_u8(crc, *bytes);
  return crc;
}
#endif

}  // namespace crc32c_detail

inline uint32_t crc32c(const uint8_t* bytes, size_t size) {
  using namespace crc32c_detail;
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return ~by_instruction(~0u, bytes, size);
#endif
  return ~by_table(~0u, bytes, size);
}

}  // namespace m3i
