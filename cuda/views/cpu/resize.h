// views on the CPU: the two passes of the resize.
//
// The horizontal pass takes rows of a picture, three bytes a pixel, as many at once as a vector has
// 32-bit numbers, and turns four pixels of each into vectors of all rows: the taps of an output are
// then whole vectors that follow each other. It writes rows of groups, for four pixels four bytes
// of red, four of green and four of blue. The vertical pass knows no pixels, only columns of bytes;
// its rows of groups become rows of three planes at the end. Sums are those of int16 weights and
// bytes in int32, by the multiply-and-add of pairs of SSE2 and newer.
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

// Rows that the horizontal pass resizes at once: one in each 32-bit number of a vector.
inline constexpr int32_t kRows = kLanes<int32_t>;

// Bytes past the last group's that a row is read and written to.
inline constexpr int64_t kOverread = 16;

// A crop of a picture.
struct Crop {
  const uint8_t* data;  // of its first pixel
  const uint8_t* end;   // of the picture
  int64_t row_stride;
  int32_t height, width;
};

// kRows rows of a picture, `stride` bytes from one to the next.
struct RowBlock {
  const uint8_t* rows;
  int64_t stride;
  const uint8_t* next;  // rows that are resized next
  int64_t next_stride;
  int32_t num_next;

  // Asks for the 64 bytes from `at` on of the next rows: pictures that were decoded with the others
  // of their batch have left the caches.
  void fetch_ahead(int64_t at) const {
    for (int32_t k = 0; k < num_next; ++k) __builtin_prefetch(next + k * next_stride + at);
  }
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
inline Bytes low32(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
inline Bytes high32(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
inline Bytes low64(Bytes a, Bytes b) { return _mm512_unpacklo_epi64(a, b); }
inline Bytes high64(Bytes a, Bytes b) { return _mm512_unpackhi_epi64(a, b); }
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
inline Bytes low32(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
inline Bytes high32(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
inline Bytes low64(Bytes a, Bytes b) { return _mm256_unpacklo_epi64(a, b); }
inline Bytes high64(Bytes a, Bytes b) { return _mm256_unpackhi_epi64(a, b); }
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

// The lanes of 16 bytes of a vector hold four rows each, lane l rows 4 l + k for k in [0, 4).

// The first 16 bytes of row 4 l + k for each lane l.
inline Bytes load_rows(const uint8_t* rows, int64_t stride, int k) {
  const uint8_t* row = rows + k * stride;
#if M3I_VECTOR_BYTES == 64
  Bytes lanes = _mm512_castsi128_si512(load16(row));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00f0, load16(row + 4 * stride));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0f00, load16(row + 8 * stride));
  return _mm512_mask_broadcast_i32x4(lanes, 0xf000, load16(row + 12 * stride));
#else
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(row)), load16(row + 4 * stride), 1);
#endif
}

// 16 bytes at `at` of row 4 l + k from each lane l.
inline void store_rows(uint8_t* to, size_t pitch, int k, int64_t at, Bytes lanes) {
  const auto store16 = [&](int row, __m128i a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + row * pitch + at), a);
  };
#if M3I_VECTOR_BYTES == 64
  store16(k, _mm512_castsi512_si128(lanes));
  store16(4 + k, _mm512_extracti32x4_epi32(lanes, 1));
  store16(8 + k, _mm512_extracti32x4_epi32(lanes, 2));
  store16(12 + k, _mm512_extracti32x4_epi32(lanes, 3));
#else
  store16(k, _mm256_castsi256_si128(lanes));
  store16(4 + k, _mm256_extracti128_si256(lanes, 1));
#endif
}

// ---- Passes -------------------------------------------------------------------------------------

// Bytes of a pair of pixels of kRows rows: a vector of each colour.
inline constexpr size_t kPairBytes = kViewChannels * kVectorBytes;

inline size_t pairs_bytes(int32_t width) { return padded(width) / 2 * kPairBytes; }

// Four pixels of each row to two pairs: numbers of 16 bits, first pixel, second pixel, row after
// row.
inline void load_pixels(const uint8_t* rows, int64_t stride, uint8_t* pairs) {
  const Bytes by_colour =
      in_lanes(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
  const Bytes first_two =
      in_lanes(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
  const Bytes next_two =
      in_lanes(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
  Bytes of[4];
  for (int k = 0; k < 4; ++k) of[k] = shuffled(load_rows(rows, stride, k), by_colour);
  const Bytes low01 = low32(of[0], of[1]), low23 = low32(of[2], of[3]);
  const Bytes colours[kViewChannels] = {low64(low01, low23), high64(low01, low23),
                                        low64(high32(of[0], of[1]), high32(of[2], of[3]))};
  for (int c = 0; c < kViewChannels; ++c) {
    store_vector(pairs + c * kVectorBytes, shuffled(colours[c], first_two));
    store_vector(pairs + kPairBytes + c * kVectorBytes, shuffled(colours[c], next_two));
  }
}

// kRows rows of a picture, their pixels in `pairs`, to rows of groups of `pitch` bytes.
inline void resize_pairs(const uint8_t* pairs, const AxisWeights& of, int32_t size, uint8_t* to,
                         size_t pitch) {
  const Bytes half = all32((1 << of.precision) >> 1);
  const Bytes by_row =
      in_lanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m128i precision = _mm_cvtsi32_si128(of.precision);
  for (int32_t i = 0; i < size; i += kGroup) {
    Bytes sums[kViewChannels][kGroup];
    for (int g = 0; g < kGroup; ++g) {
      const int16_t* weights = of.weights + static_cast<size_t>(i + g) * of.taps;
      const uint8_t* pair = pairs + of.first[i + g] / 2 * kPairBytes;
      Bytes red = half, green = half, blue = half;
      for (int32_t j = 0; j < of.count[i + g]; j += 2, pair += kPairBytes) {
        const Bytes by = pair_of(weights + j);
        red = plus(red, products(load_vector(pair), by));
        green = plus(green, products(load_vector(pair + kVectorBytes), by));
        blue = plus(blue, products(load_vector(pair + 2 * kVectorBytes), by));
      }
      sums[0][g] = shifted(red, precision);
      sums[1][g] = shifted(green, precision);
      sums[2][g] = shifted(blue, precision);
    }
    Bytes colours[kViewChannels];  // of each row four bytes, those of the four outputs
    for (int c = 0; c < kViewChannels; ++c) {
      colours[c] = shuffled(
          packed16(packed32(sums[c][0], sums[c][1]), packed32(sums[c][2], sums[c][3])), by_row);
    }
    const Bytes low01 = low32(colours[0], colours[1]), high01 = high32(colours[0], colours[1]);
    const Bytes low2 = low32(colours[2], colours[2]), high2 = high32(colours[2], colours[2]);
    // The four bytes too many are those of the next group
    const int64_t at = static_cast<int64_t>(i) * kViewChannels;
    store_rows(to, pitch, 0, at, low64(low01, low2));
    store_rows(to, pitch, 1, at, high64(low01, low2));
    store_rows(to, pitch, 2, at, low64(high01, high2));
    store_rows(to, pitch, 3, at, high64(high01, high2));
  }
}

// kRows rows of a picture to rows of groups of `pitch` bytes. `pairs`: memory.
inline void resize_block(const RowBlock& block, const AxisWeights& of, int32_t size, uint8_t* pairs,
                         uint8_t* to, size_t pitch) {
  for (int32_t x = 0; x < of.end; x += kGroup) {
    const int64_t at = static_cast<int64_t>(x) * kViewChannels;
    if (at % 64 < kGroup * kViewChannels) block.fetch_ahead(at);
    load_pixels(block.rows + at, block.stride, pairs + x / 2 * kPairBytes);
  }
  resize_pairs(pairs, of, size, to, pitch);
}

// The first `bytes` of a row of groups, of `count` rows from `rows` on.
inline void resize_column(const uint8_t* rows, size_t pitch, size_t bytes, const int16_t* weights,
                          int32_t count, int precision, uint8_t* to) {
  const Bytes zero = Bytes{}, half = all32((1 << precision) >> 1);
  const __m128i by = _mm_cvtsi32_si128(precision);
  for (size_t at = 0; at < bytes; at += kVectorBytes) {
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

inline size_t pairs_bytes(int32_t) { return 0; }

inline void resize_block(const RowBlock& block, const AxisWeights& of, int32_t size, uint8_t*,
                         uint8_t* to, size_t pitch) {
  for (int32_t row = 0; row < kRows; ++row) {
    for (int32_t i = 0; i < padded(size); ++i) {
      const int16_t* weights = of.weights + static_cast<size_t>(i) * of.taps;
      const uint8_t* pixels =
          block.rows + row * block.stride + static_cast<int64_t>(of.first[i]) * kViewChannels;
      uint8_t* group = to + row * pitch + i / kGroup * kGroup * kViewChannels + i % kGroup;
      for (int c = 0; c < kViewChannels; ++c) {
        int32_t sum = (1 << of.precision) >> 1;
        for (int32_t j = 0; j < of.count[i]; ++j) sum += weights[j] * pixels[j * kViewChannels + c];
        group[c * kGroup] = static_cast<uint8_t>(resize_rounded(sum, of.precision));
      }
    }
  }
}

inline void resize_column(const uint8_t* rows, size_t pitch, size_t bytes, const int16_t* weights,
                          int32_t count, int precision, uint8_t* to) {
  for (size_t at = 0; at < bytes; ++at) {
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
  uint8_t* pairs;   // [pairs_bytes]
  uint8_t* rows;    // [kRows, row_bytes], for copies of rows
  int64_t row_bytes;
};

inline int64_t row_bytes(const Crop& crop) {
  return (static_cast<int64_t>(crop.width) * kViewChannels + 63) / 64 * 64 + kOverread;
}

// The rows of a crop from y on, or copies of them where there are fewer than kRows or where reading
// on would leave the picture.
inline RowBlock rows_from(int32_t y, const Crop& crop, int64_t reach, const ResizeMemory& memory) {
  const uint8_t* first = crop.data + y * crop.row_stride;
  const int32_t left = crop.height - y - kRows;
  RowBlock block = {first, crop.row_stride, first + kRows * crop.row_stride, crop.row_stride,
                    std::clamp(left, 0, kRows)};
  if (left >= 0 && crop.end - (block.next - crop.row_stride) >= reach) return block;
  block.rows = memory.rows;
  block.stride = memory.row_bytes;
  for (int32_t k = 0; k < kRows; ++k) {
    const int32_t at = std::min(y + k, crop.height - 1);
    std::memcpy(memory.rows + k * block.stride, crop.data + at * crop.row_stride,
                static_cast<size_t>(crop.width) * kViewChannels);
  }
  return block;
}

// All rows of a crop to rows of groups.
inline void resize_rows(const Crop& crop, const AxisWeights& of, int32_t size,
                        const ResizeMemory& memory) {
  const size_t pitch = group_pitch(size);
  const int64_t reach = static_cast<int64_t>(of.end) * kViewChannels + kOverread;
  for (int32_t y = 0; y < crop.height; y += kRows) {
    resize_block(rows_from(y, crop, reach, memory), of, size, memory.pairs,
                 memory.groups + y * pitch, pitch);
  }
}

// Rows of groups to planes [3, height, width].
inline void resize_columns(const AxisWeights& of, int32_t height, int32_t width,
                           const ResizeMemory& memory, uint8_t* planes) {
  const size_t pitch = group_pitch(width), row = static_cast<size_t>(width);
  const size_t row_bytes = static_cast<size_t>(padded(width)) * kViewChannels;
  for (int32_t i = 0; i < height; ++i) {
    resize_column(memory.groups + of.first[i] * pitch, pitch, row_bytes,
                  of.weights + static_cast<size_t>(i) * of.taps, of.count[i], of.precision,
                  memory.column);
    ungroup(memory.column, width, planes + i * row, static_cast<size_t>(height) * row);
  }
}

}  // namespace
}  // namespace views
}  // namespace m3i
