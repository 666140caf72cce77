// views on the CPU: the two passes of the resize.
//
// The horizontal pass reads rows of a picture, three bytes a pixel, and writes rows of groups, for
// four pixels four bytes of red, four of green and four of blue. The vertical pass knows no pixels,
// only columns of bytes; its rows of groups become rows of three planes at the end. Sums are those
// of int16 weights and bytes in int32, by the multiply-and-add of pairs of SSE2 and newer.
#pragma once

#include "m3i/cpu/vec.h"
#include "views/cpu/kernel_table.h"
#include "views/cpu/weights.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace m3i {
namespace views {
namespace {

// Rows that the horizontal pass resizes at once.
inline constexpr int32_t kRows = 4;

// Bytes past the last pixel's that a row is read to.
inline constexpr int64_t kOverread = 16;

// A crop of a picture.
struct Crop {
  const uint8_t* data;  // of its first pixel
  const uint8_t* end;   // of the picture
  int64_t row_stride;
  int32_t height, width;
};

// Bytes from a row of groups to the next: whole vectors.
inline size_t group_pitch(int32_t size) {
  const size_t bytes = static_cast<size_t>(padded(size)) * kViewChannels;
  return (bytes + kOverread + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}

// Rows of groups: those of the crop, in whole steps of the horizontal pass, and one that a pair of
// taps of the vertical pass may reach, of weight 0.
inline size_t group_rows(int32_t height) { return (height + kRows - 1) / kRows * kRows + 1; }

#if M3I_VECTOR_BYTES >= 32

// ---- Integers in vectors ------------------------------------------------------------------------

#if M3I_VECTOR_BYTES == 64
using Bytes = __m512i;
inline Bytes load_vector(const void* from) { return _mm512_loadu_si512(from); }
inline void store_vector(void* to, Bytes a) { _mm512_storeu_si512(to, a); }
inline Bytes all32(int32_t a) { return _mm512_set1_epi32(a); }
inline Bytes in_lanes(__m128i a) { return _mm512_broadcast_i32x4(a); }
inline Bytes shuffled(Bytes a, Bytes order) { return _mm512_shuffle_epi8(a, order); }
inline Bytes low8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes products(Bytes a, Bytes b) { return _mm512_madd_epi16(a, b); }
inline Bytes plus(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
inline Bytes shifted(Bytes a, __m128i by) { return _mm512_sra_epi32(a, by); }
inline Bytes packed32(Bytes a, Bytes b) { return _mm512_packs_epi32(a, b); }
inline Bytes packed16(Bytes a, Bytes b) { return _mm512_packus_epi16(a, b); }
#else
using Bytes = __m256i;
inline Bytes load_vector(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline void store_vector(void* to, Bytes a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
inline Bytes all32(int32_t a) { return _mm256_set1_epi32(a); }
inline Bytes in_lanes(__m128i a) { return _mm256_broadcastsi128_si256(a); }
inline Bytes shuffled(Bytes a, Bytes order) { return _mm256_shuffle_epi8(a, order); }
inline Bytes low8(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high8(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes products(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
inline Bytes plus(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
inline Bytes shifted(Bytes a, __m128i by) { return _mm256_sra_epi32(a, by); }
inline Bytes packed32(Bytes a, Bytes b) { return _mm256_packs_epi32(a, b); }
inline Bytes packed16(Bytes a, Bytes b) { return _mm256_packus_epi16(a, b); }
#endif

inline __m128i load16(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// Two taps' weights, in all 32 bits of a vector.
inline Bytes pair_of(const int16_t* weights) {
  int32_t pair;
  std::memcpy(&pair, weights, sizeof(pair));
  return all32(pair);
}

// 16 bytes of each of as many rows as a vector has lanes.
inline constexpr int kLaneRows = kVectorBytes / 16;

inline Bytes load_rows(const uint8_t* const* rows, int64_t at) {
#if M3I_VECTOR_BYTES == 64
  Bytes lanes = _mm512_castsi128_si512(load16(rows[0] + at));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00f0, load16(rows[1] + at));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0f00, load16(rows[2] + at));
  return _mm512_mask_broadcast_i32x4(lanes, 0xf000, load16(rows[3] + at));
#else
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(rows[0] + at)), load16(rows[1] + at),
                                 1);
#endif
}

inline __m128i lane_of(Bytes a, int lane) {
#if M3I_VECTOR_BYTES == 64
  return lane == 0   ? _mm512_castsi512_si128(a)
         : lane == 1 ? _mm512_extracti32x4_epi32(a, 1)
         : lane == 2 ? _mm512_extracti32x4_epi32(a, 2)
                     : _mm512_extracti32x4_epi32(a, 3);
#else
  return lane == 0 ? _mm256_castsi256_si128(a) : _mm256_extracti128_si256(a, 1);
#endif
}

// ---- Passes -------------------------------------------------------------------------------------

// Bytes of two neighbouring pixels as pairs of 16 bits: of red, green, blue and nothing.
inline Bytes pixel_pair(int first) {
  const char a = static_cast<char>(3 * first), b = static_cast<char>(a + 3);
  return in_lanes(
      _mm_setr_epi8(a, -1, b, -1, a + 1, -1, b + 1, -1, a + 2, -1, b + 2, -1, -1, -1, -1, -1));
}

// Four rows of a picture to four rows of groups, of `pitch` bytes.
inline void resize_four_rows(const uint8_t* const* from, const AxisWeights& of, int32_t size,
                             uint8_t* to, size_t pitch) {
  constexpr int kParts = kRows / kLaneRows;
  const Bytes first_two = pixel_pair(0), next_two = pixel_pair(2);
  const Bytes half = all32((1 << of.precision) >> 1);
  const Bytes to_groups =
      in_lanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m128i precision = _mm_cvtsi32_si128(of.precision);
  for (int32_t i = 0; i < size; i += kGroup) {
    Bytes sums[kGroup][kParts];
    for (int g = 0; g < kGroup; ++g) {
      const int16_t* weights = of.weights + static_cast<size_t>(i + g) * of.taps;
      int64_t at = static_cast<int64_t>(of.first[i + g]) * kViewChannels;
      Bytes sum[kParts];
      for (int part = 0; part < kParts; ++part) sum[part] = half;
      int32_t j = 0;
      for (; j + 4 <= of.taps; j += 4, at += 4 * kViewChannels) {
        const Bytes a = pair_of(weights + j), b = pair_of(weights + j + 2);
        for (int part = 0; part < kParts; ++part) {
          const Bytes pixels = load_rows(from + part * kLaneRows, at);
          sum[part] = plus(sum[part], products(shuffled(pixels, first_two), a));
          sum[part] = plus(sum[part], products(shuffled(pixels, next_two), b));
        }
      }
      if (j < of.taps) {
        const Bytes a = pair_of(weights + j);
        for (int part = 0; part < kParts; ++part) {
          const Bytes pixels = load_rows(from + part * kLaneRows, at);
          sum[part] = plus(sum[part], products(shuffled(pixels, first_two), a));
        }
      }
      for (int part = 0; part < kParts; ++part) sums[g][part] = shifted(sum[part], precision);
    }
    for (int part = 0; part < kParts; ++part) {
      const Bytes words =
          packed16(packed32(sums[0][part], sums[1][part]), packed32(sums[2][part], sums[3][part]));
      const Bytes groups = shuffled(words, to_groups);
      for (int lane = 0; lane < kLaneRows; ++lane) {
        uint8_t* row = to + (part * kLaneRows + lane) * pitch + i * kViewChannels;
        // The four bytes too many are those of the next group
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row), lane_of(groups, lane));
      }
    }
  }
}

// One row of groups, of `count` rows from `rows` on.
inline void resize_column(const uint8_t* rows, size_t pitch, const int16_t* weights, int32_t count,
                          int precision, uint8_t* to) {
  const Bytes zero = Bytes{}, half = all32((1 << precision) >> 1);
  const __m128i by = _mm_cvtsi32_si128(precision);
  for (size_t at = 0; at < pitch; at += kVectorBytes) {
    Bytes sum0 = half, sum1 = half, sum2 = half, sum3 = half;
    for (int32_t j = 0; j < count; j += 2) {
      const Bytes pair = pair_of(weights + j);
      const Bytes a = load_vector(rows + j * pitch + at),
                  b = load_vector(rows + (j + 1) * pitch + at);
      const Bytes low = low8(a, b), high = high8(a, b);
      sum0 = plus(sum0, products(low8(low, zero), pair));
      sum1 = plus(sum1, products(high8(low, zero), pair));
      sum2 = plus(sum2, products(low8(high, zero), pair));
      sum3 = plus(sum3, products(high8(high, zero), pair));
    }
    store_vector(to + at, packed16(packed32(shifted(sum0, by), shifted(sum1, by)),
                                   packed32(shifted(sum2, by), shifted(sum3, by))));
  }
}

#else

// ---- Any machine --------------------------------------------------------------------------------

inline void resize_four_rows(const uint8_t* const* from, const AxisWeights& of, int32_t size,
                             uint8_t* to, size_t pitch) {
  for (int32_t row = 0; row < kRows; ++row) {
    for (int32_t i = 0; i < padded(size); ++i) {
      const int16_t* weights = of.weights + static_cast<size_t>(i) * of.taps;
      const uint8_t* pixels = from[row] + static_cast<int64_t>(of.first[i]) * kViewChannels;
      uint8_t* group = to + row * pitch + i / kGroup * kGroup * kViewChannels + i % kGroup;
      for (int c = 0; c < kViewChannels; ++c) {
        int32_t sum = (1 << of.precision) >> 1;
        for (int32_t j = 0; j < of.count[i]; ++j) sum += weights[j] * pixels[j * kViewChannels + c];
        group[c * kGroup] = static_cast<uint8_t>(resize_rounded(sum, of.precision));
      }
    }
  }
}

inline void resize_column(const uint8_t* rows, size_t pitch, const int16_t* weights, int32_t count,
                          int precision, uint8_t* to) {
  for (size_t at = 0; at < pitch; ++at) {
    int32_t sum = (1 << precision) >> 1;
    for (int32_t j = 0; j < count; ++j) sum += weights[j] * rows[j * pitch + at];
    to[at] = static_cast<uint8_t>(resize_rounded(sum, precision));
  }
}

#endif

// A row of groups to a row of three planes of `plane` bytes.
inline void ungroup(const uint8_t* groups, int32_t size, uint8_t* to, size_t plane) {
  int32_t x = 0;
  for (; x + kGroup <= size; x += kGroup, groups += kGroup * kViewChannels) {
    for (int c = 0; c < kViewChannels; ++c) std::memcpy(to + c * plane + x, groups + c * kGroup, 4);
  }
  for (int32_t k = 0; x + k < size; ++k) {
    for (int c = 0; c < kViewChannels; ++c) to[c * plane + x + k] = groups[c * kGroup + k];
  }
}

struct ResizeMemory {
  uint8_t* groups;  // [group_rows, group_pitch]
  uint8_t* column;  // [group_pitch]
  uint8_t* rows;    // [kRows, row_bytes], for rows of which reading on would leave the picture
  size_t row_bytes;
};

inline size_t row_bytes(const Crop& crop) {
  return (static_cast<size_t>(crop.width) * kViewChannels + 63) / 64 * 64;
}

// All rows of a crop to rows of groups.
inline void resize_rows(const Crop& crop, const AxisWeights& of, int32_t size,
                        const ResizeMemory& memory) {
  const size_t pitch = group_pitch(size);
  const int64_t reach = static_cast<int64_t>(of.last + of.taps) * kViewChannels + kOverread;
  for (int32_t y = 0; y < crop.height; y += kRows) {
    const uint8_t* rows[kRows];
    for (int32_t k = 0; k < kRows; ++k) {
      const int32_t at = y + k < crop.height ? y + k : crop.height - 1;
      rows[k] = crop.data + at * crop.row_stride;
      if (crop.end - rows[k] >= reach) continue;
      uint8_t* copy = memory.rows + k * memory.row_bytes;
      std::memcpy(copy, rows[k], static_cast<size_t>(crop.width) * kViewChannels);
      rows[k] = copy;
    }
    resize_four_rows(rows, of, size, memory.groups + y * pitch, pitch);
  }
}

// Rows of groups to planes [3, size, size].
inline void resize_columns(const AxisWeights& of, int32_t size, const ResizeMemory& memory,
                           uint8_t* planes) {
  const size_t pitch = group_pitch(size), row = static_cast<size_t>(size);
  for (int32_t i = 0; i < size; ++i) {
    resize_column(memory.groups + of.first[i] * pitch, pitch,
                  of.weights + static_cast<size_t>(i) * of.taps, of.count[i], of.precision,
                  memory.column);
    ungroup(memory.column, size, planes + i * row, row * row);
  }
}

}  // namespace
}  // namespace views
}  // namespace m3i
