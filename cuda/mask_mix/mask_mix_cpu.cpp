// mask_mix: CPU kernel.
//
// A band is one row of cells of one pair: its runs of equal cells are found once and then copied,
// normalised, for every pixel row and channel. Bands are independent, so threads change nothing in
// the result; every instruction set rounds as one fused multiply-add does, so the bits are the same
// on every machine, and those of the CUDA kernel.
#include "m3i/bf16.h"
#include "m3i/cpu_isa.h"
#include "m3i/dispatch.h"
#include "mask_mix/mask_mix_args.h"

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

// ---- Normalising a run --------------------------------------------------------------------------

// out[i] = round_to_out(fma(in[i], scale, shift)), i < size.
template <class Out>
using NormaliseRun = void (*)(const uint8_t* in, Out* out, int64_t size, float scale, float shift);

inline void round_into(float value, float& out) { out = value; }
inline void round_into(float value, BFloat16& out) { out.bits = bf16_bits(value); }

template <class Out>
void normalise_run(const uint8_t* in, Out* out, int64_t size, float scale, float shift) {
  for (int64_t i = 0; i < size; ++i) {
    // In double both steps are exact (8 bits times 24 bits, plus 24 bits), so this rounds once, as
    // fma does.
    round_into(static_cast<float>(static_cast<double>(in[i]) * scale + shift), out[i]);
  }
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
M3I_TARGET_AVX2 void normalise_run_avx2(const uint8_t* in, Out* out, int64_t size, float scale,
                                        float shift) {
  const __m256 scales = _mm256_set1_ps(scale);
  const __m256 shifts = _mm256_set1_ps(shift);
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i));
    const __m256 pixels = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    store8(out + i, _mm256_fmadd_ps(pixels, scales, shifts));
  }
  normalise_run(in + i, out + i, size - i, scale, shift);
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
M3I_TARGET_AVX512 void normalise_run_avx512(const uint8_t* in, Out* out, int64_t size, float scale,
                                            float shift) {
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 shifts = _mm512_set1_ps(shift);
  for (int64_t i = 0; i < size; i += 16) {
    const int64_t left = size - i;
    const __mmask16 lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes, in + i);
    const __m512 pixels = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    store16(out + i, lanes, _mm512_fmadd_ps(pixels, scales, shifts));
  }
}

#endif  // __x86_64__

template <class Out>
NormaliseRun<Out> fastest_normalise_run() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return normalise_run_avx512<Out>;
  if (cpu_isa() == CpuIsa::kAvx2) return normalise_run_avx2<Out>;
#endif
  return normalise_run<Out>;
}

// ---- Mixing -------------------------------------------------------------------------------------

// Neighbouring cells of one row that show the same view.
struct Run {
  int64_t begin;         // first pixel of the row
  int64_t size;          // pixels
  const uint8_t* image;  // [3, H, W], the view shown
};

void find_runs(const MaskMixParams& p, int64_t pair, int64_t band, std::vector<Run>& runs) {
  const bool* cells = p.mask + (pair * p.grid_height + band) * p.grid_width;
  const int64_t cell_width = p.width / p.grid_width;
  const int64_t image_size = kMaskMixChannels * p.height * p.width;
  runs.clear();
  for (int64_t begin = 0, end = 0; begin < p.grid_width; begin = end) {
    while (end < p.grid_width && cells[end] == cells[begin]) ++end;
    const int64_t view = p.pairs[2 * pair + (cells[begin] ? 0 : 1)];
    runs.push_back({begin * cell_width, (end - begin) * cell_width, p.views + view * image_size});
  }
}

template <class Out>
void mask_mix(const MaskMixParams& p) {
  const NormaliseRun<Out> normalise = fastest_normalise_run<Out>();
  const int64_t plane = p.height * p.width;
  const int64_t cell_height = p.height / p.grid_height;
  const int64_t band_pixels = kMaskMixChannels * cell_height * p.width;
  const int64_t grain = std::max<int64_t>(1, kGrainPixels / std::max<int64_t>(1, band_pixels));

  torch::stable::parallel_for(
      0, p.num_pairs * p.grid_height, grain, [&](int64_t first, int64_t last) {
        std::vector<Run> runs;
        for (int64_t task = first; task < last; ++task) {
          const int64_t pair = task / p.grid_height;
          const int64_t band = task % p.grid_height;
          find_runs(p, pair, band, runs);
          for (int64_t row = 0; row < kMaskMixChannels * cell_height; ++row) {
            const int64_t channel = row / cell_height;
            const int64_t y = band * cell_height + row % cell_height;
            const int64_t offset = channel * plane + y * p.width;
            Out* out = static_cast<Out*>(p.out) + pair * kMaskMixChannels * plane + offset;
            for (const Run& run : runs) {
              normalise(run.image + offset + run.begin, out + run.begin, run.size, p.scale[channel],
                        p.shift[channel]);
            }
          }
        }
      });
}

void check_pairs(const MaskMixParams& p) {
  for (int64_t i = 0; i < 2 * p.num_pairs; ++i) {
    STD_TORCH_CHECK(0 <= p.pairs[i] && p.pairs[i] < p.num_views, "pairs[", i / 2, ", ", i % 2,
                    "]: expected a row of views, 0 <= row < ", p.num_views, ", got ", p.pairs[i]);
  }
}

Tensor mask_mix_cpu(const Tensor& views, const Tensor& mask, const Tensor& pairs,
                    std::vector<double> mean, std::vector<double> std,
                    torch::headeronly::ScalarType dtype) {
  const MaskMixCall call = prepare_mask_mix(views, mask, pairs, mean, std, dtype);
  check_pairs(call.params);
  dispatch_dtype(call.params.out_dtype,
                 [&](auto out) { mask_mix<typename decltype(out)::type>(call.params); });
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) { library.impl("mask_mix", TORCH_BOX(&mask_mix_cpu)); }

}  // namespace
}  // namespace m3i
