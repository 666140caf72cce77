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
// One chain of dependent instructions: 8 bytes every 3 cycles, 8 GB/s at 3 GHz, so that a picture
// of 100 kB costs 13 us beside a millisecond of decoding.
__attribute__((target("sse4.2"))) inline uint32_t by_instruction(uint32_t crc, const uint8_t* bytes,
                                                                 size_t size) {
  uint64_t wide = crc;
  for (; size >= 8; size -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    wide = _mm_crc32_u64(wide, word);
  }
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
