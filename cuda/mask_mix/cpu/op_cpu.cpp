// mask_mix: CPU kernel.
//
// A band is one row of cells of one picture. Its cells are spread to a byte a pixel once; then
// every pixel row of it, in every channel, is blended from two rows of bytes and normalised. The
// two are those of the picture's views, where it has one or two: both are read even where one is
// hidden, as a cache line holds several cells, so skipping would save little traffic and cost a
// branch a cell. Of three views or more the cells shown are first copied into one row, which is
// both of the two.
//
// Bands are independent, so threads change nothing in the result. Every instruction set rounds as
// one fused multiply-add does: the bits are the same on every machine, and those of the CUDA
// kernel.
#include "m3i/cpu/isa.h"
#include "m3i/dispatch.h"
#include "m3i/numbers/bf16.h"
#include "mask_mix/args.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace m3i {
namespace {

using torch::stable::Tensor;

// Below this many pixels a thread is not worth waking.
constexpr int64_t kGrainPixels = 64 * 1024;

// ---- One row of pixels --------------------------------------------------------------------------

// One channel of a pixel row, of two views.
struct Row {
  const uint8_t* first;   // [W]
  const uint8_t* second;  // [W]
  const uint8_t* shown;   // [W] 0xff: first, 0: second
  int64_t width;          // W
  float scale, shift;     // out = fma(pixel, scale, shift)
};

template <class Out>
using MixRow = void (*)(const Row& row, Out* out);

inline void round_into(float value, float& out) { out = value; }
inline void round_into(float value, BFloat16& out) { out.bits = bf16_bits(value); }

template <class Out>
void mix_pixels(const Row& row, int64_t begin, Out* out) {
  for (int64_t x = begin; x < row.width; ++x) {
    const uint8_t pixel = row.shown[x] ? row.first[x] : row.second[x];
    // In double both steps are exact (8 bits times 24 bits, plus 24 bits), so this rounds once, as
    // fma does.
    round_into(static_cast<float>(static_cast<double>(pixel) * row.scale + row.shift), out[x]);
  }
}

template <class Out>
void mix_row(const Row& row, Out* out) {
  mix_pixels(row, 0, out);
}

#if defined(__x86_64__)

M3I_TARGET_AVX2 inline void store8(float* out, __m256 values) { _mm256_storeu_ps(out, values); }

// Rounds as bf16_bits does (no NaN arises here).
M3I_TARGET_AVX2 inline void store8(BFloat16* out, __m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}

template <class Out>
M3I_TARGET_AVX2 void mix_row_avx2(const Row& row, Out* out) {
  const __m256 scale = _mm256_set1_ps(row.scale);
  const __m256 shift = _mm256_set1_ps(row.shift);
  const auto load8 = [](const uint8_t* from) M3I_TARGET_AVX2 {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  };
  int64_t x = 0;
  for (; x + 8 <= row.width; x += 8) {
    const __m128i bytes =
        _mm_blendv_epi8(load8(row.second + x), load8(row.first + x), load8(row.shown + x));
    const __m256 pixels = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    store8(out + x, _mm256_fmadd_ps(pixels, scale, shift));
  }
  mix_pixels(row, x, out);
}

M3I_TARGET_AVX512 inline void store16(float* out, __mmask16 lanes, __m512 values) {
  _mm512_mask_storeu_ps(out, lanes, values);
}

// Rounds as bf16_bits does (no NaN arises here). Not AVX512_BF16's conversion, which flushes
// denormals.
M3I_TARGET_AVX512 inline void store16(BFloat16* out, __mmask16 lanes, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  _mm256_mask_storeu_epi16(out, lanes, _mm512_cvtepi32_epi16(high));
}

template <class Out>
M3I_TARGET_AVX512 void mix_row_avx512(const Row& row, Out* out) {
  const __m512 scale = _mm512_set1_ps(row.scale);
  const __m512 shift = _mm512_set1_ps(row.shift);
  for (int64_t x = 0; x < row.width; x += 16) {
    const int64_t left = row.width - x;
    const __mmask16 lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    const __mmask16 first = _mm_movepi8_mask(_mm_maskz_loadu_epi8(lanes, row.shown + x));
    const __m128i hidden = _mm_maskz_loadu_epi8(lanes, row.second + x);
    const __m128i bytes = _mm_mask_loadu_epi8(hidden, first, row.first + x);
    const __m512 pixels = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    store16(out + x, lanes, _mm512_fmadd_ps(pixels, scale, shift));
  }
}

#endif  // __x86_64__

template <class Out>
MixRow<Out> fastest_mix_row() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return mix_row_avx512<Out>;
  if (cpu_isa() == CpuIsa::kAvx2) return mix_row_avx2<Out>;
#endif
  return mix_row<Out>;
}

// ---- All rows -----------------------------------------------------------------------------------

// One row of cells of a picture.
struct Cells {
  const uint8_t* choice;   // [w]
  const int64_t* members;  // [K]
  int64_t count;           // w
  int64_t width;           // pixels of one
};

void spread_cells(const Cells& cells, uint8_t* shown) {
  for (int64_t i = 0; i < cells.count; ++i) {
    std::fill_n(shown + i * cells.width, cells.width, cells.choice[i] == 0 ? 0xff : 0);
  }
}

// `at`: the pixel row of the first of all views; `image`: bytes of a view.
void gather_cells(const Cells& cells, const uint8_t* at, int64_t image, uint8_t* row) {
  for (int64_t i = 0; i < cells.count; ++i) {
    const uint8_t* from = at + cells.members[cells.choice[i]] * image;
    std::copy_n(from + i * cells.width, cells.width, row + i * cells.width);
  }
}

template <class Out>
void mask_mix(const MaskMixParams& p) {
  const MixRow<Out> mix = fastest_mix_row<Out>();
  const int64_t plane = p.height * p.width;
  const int64_t image = kMaskMixChannels * plane;
  const int64_t cell_height = p.height / p.grid_height;
  const int64_t cell_width = p.width / p.grid_width;
  const int64_t band_pixels = kMaskMixChannels * cell_height * p.width;
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / std::max<int64_t>(1, band_pixels));

  torch::stable::parallel_for(
      0, p.num_pictures * p.grid_height, grain, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> shown(p.width), gathered(p.num_members > 2 ? p.width : 0);
        for (int64_t band = begin; band < end; ++band) {
          const int64_t picture = band / p.grid_height;
          const int64_t* members = p.members + picture * p.num_members;
          const Cells cells{p.choice + band * p.grid_width, members, p.grid_width, cell_width};
          spread_cells(cells, shown.data());
          const uint8_t* first = p.views + members[0] * image;
          const uint8_t* second = p.views + members[p.num_members - 1] * image;
          Out* out = static_cast<Out*>(p.out) + picture * image;
          for (int c = 0; c < kMaskMixChannels; ++c) {
            for (int64_t i = 0; i < cell_height; ++i) {
              const int64_t y = band % p.grid_height * cell_height + i;
              const int64_t at = c * plane + y * p.width;
              Row row{first + at, second + at, shown.data(), p.width, p.scale[c], p.shift[c]};
              if (p.num_members > 2) {
                gather_cells(cells, p.views + at, image, gathered.data());
                row.first = row.second = gathered.data();
              }
              mix(row, out + at);
            }
          }
        }
      });
}

void check_choice(const MaskMixParams& p) {
  const int64_t num_cells = p.grid_height * p.grid_width;
  const uint8_t* end = p.choice + p.num_pictures * num_cells;
  // The largest by a loop that is vectorised: a search would take a cycle a cell.
  uint8_t largest = 0;
  for (const uint8_t* at = p.choice; at < end; ++at) largest = std::max(largest, *at);
  if (largest < p.num_members) return;
  const int64_t at = std::find(p.choice, end, largest) - p.choice;
  STD_TORCH_CHECK(false, "choice[", at / num_cells, ", ", at % num_cells / p.grid_width, ", ",
                  at % p.grid_width, "]: expected a column of members, 0 <= column < ",
                  p.num_members, ", got ", static_cast<int>(largest));
}

void check_members(const MaskMixParams& p) {
  for (int64_t i = 0; i < p.num_pictures * p.num_members; ++i) {
    STD_TORCH_CHECK(0 <= p.members[i] && p.members[i] < p.num_views, "members[", i / p.num_members,
                    ", ", i % p.num_members, "]: expected a row of views, 0 <= row < ", p.num_views,
                    ", got ", p.members[i]);
  }
}

Tensor mask_mix_cpu(const Tensor& views, const Tensor& choice, const Tensor& members,
                    std::vector<double> mean, std::vector<double> std,
                    torch::headeronly::ScalarType dtype) {
  const MaskMixCall call = prepare_mask_mix(views, choice, members, mean, std, dtype);
  check_choice(call.params);
  check_members(call.params);
  dispatch_dtype<float, BFloat16>(call.params.out_dtype, [&](auto out) {
    mask_mix<typename decltype(out)::type>(call.params);
  });
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) { library.impl("mask_mix", TORCH_BOX(&mask_mix_cpu)); }

}  // namespace
}  // namespace m3i
