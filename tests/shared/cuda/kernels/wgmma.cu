// Products of one warpgroup, for the tests of the emulator: the operands come as images of shared
// memory, laid out by the test.
#include "m3i/host/launch.h"
#include "m3i/gpu/shared.cuh"
#include "m3i/gpu/wgmma.cuh"

namespace {

using m3i::Major;

constexpr int kMostSteps = 8;

// An operand: its bytes, and where in them each 16 of k begin.
struct Operand {
  const uint32_t* image;
  int bytes;  // a multiple of 1024
  uint32_t leading, stride;
  int starts[kMostSteps];
};

struct Problem {
  Operand a, b;
  m3i::Swizzle swizzle;
  int steps;
  bool accumulate;         // to what is in d, else the first product sets it
  const uint16_t* a_rows;  // [64, 16 steps], for A in registers
  float* d;                // [64, columns]
};

__device__ void copy_image(unsigned char* to, const Operand& operand) {
  for (int i = threadIdx.x; i < operand.bytes / 4; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(to)[i] = operand.image[i];
  }
}

__device__ uint64_t describe(const unsigned char* image, const Operand& operand, int step,
                             m3i::Swizzle swizzle) {
  const uint64_t first = m3i::wgmma_descriptor(image, operand.leading, operand.stride, swizzle);
  return m3i::wgmma_advance(first, operand.starts[step]);
}

// The pair at (row, k) of A [64, width].
__device__ uint32_t load_pair(const uint16_t* rows, int width, int row, int k) {
  return *reinterpret_cast<const uint32_t*>(rows + row * width + k);
}

template <int kColumns, class Put>
__device__ void for_each_element(float* d, Put put) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    put(d[row * kColumns + column], i);
  }
}

template <int kColumns, class T, Major kA, Major kB, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(const Problem problem) {
  unsigned char* a = m3i::dynamic_shared();
  unsigned char* b = a + problem.a.bytes;
  copy_image(a, problem.a);
  copy_image(b, problem.b);
  m3i::fence_proxy_async();
  __syncthreads();
  float d[kColumns / 2];
  for_each_element<kColumns>(problem.d, [&](float& value, int i) { d[i] = value; });
  uint32_t words[kMostSteps][4] = {};
  if constexpr (kRegisters) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, width = 16 * problem.steps;
#pragma unroll
    for (int step = 0; step < kMostSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = 16 * step + threadIdx.x % 4 * 2 + i / 2 * 8;
        if (step < problem.steps) {
          words[step][i] = load_pair(problem.a_rows, width, row + i % 2 * 8, k);
        }
      }
    }
  }
  m3i::wgmma_fence(d);
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step) {
    if (step >= problem.steps) break;
    const bool accumulate = step > 0 || problem.accumulate;
    const uint64_t columns = describe(b, problem.b, step, problem.swizzle);
    if constexpr (kRegisters) {
      m3i::wgmma<kColumns, T, kB>(d, words[step], columns, accumulate);
    } else {
      m3i::wgmma<kColumns, T, kA, kB>(d, describe(a, problem.a, step, problem.swizzle), columns,
                                      accumulate);
    }
  }
  m3i::wgmma_commit();
  m3i::wgmma_wait<0>(d);
  for_each_element<kColumns>(problem.d, [&](float& value, int i) { value = d[i]; });
}

template <int kColumns, class T, Major kA, Major kB, bool kRegisters>
cudaError_t launch(const Problem& problem) {
  return m3i::launch_with_shared(wgmma_kernel<kColumns, T, kA, kB, kRegisters>, 1, 128,
                                 problem.a.bytes + problem.b.bytes, nullptr, problem);
}

template <int kColumns, class T>
cudaError_t launch_majors(const Problem& problem, bool a_mn, bool b_mn) {
  constexpr auto kK = Major::kK, kMN = Major::kMN;
  if (problem.a_rows) {
    return b_mn ? launch<kColumns, T, kK, kMN, true>(problem)
                : launch<kColumns, T, kK, kK, true>(problem);
  }
  if (a_mn) {
    return b_mn ? launch<kColumns, T, kMN, kMN, false>(problem)
                : launch<kColumns, T, kMN, kK, false>(problem);
  }
  return b_mn ? launch<kColumns, T, kK, kMN, false>(problem)
              : launch<kColumns, T, kK, kK, false>(problem);
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

// a: [64, 16 steps], b: [16 steps, columns]. For 64 columns every layout and type; for others A and
// B K-major, in bfloat16.
M3I_TEST_API cudaError_t wgmma(const Problem* problem, int columns, bool half, bool a_mn,
                               bool b_mn) {
  using m3i::BFloat16, m3i::Float16;
  switch (columns) {
    case 64:
      return half ? launch_majors<64, Float16>(*problem, a_mn, b_mn)
                  : launch_majors<64, BFloat16>(*problem, a_mn, b_mn);
    case 32:
      return launch<32, BFloat16, Major::kK, Major::kK, false>(*problem);
    case 128:
      return launch<128, BFloat16, Major::kK, Major::kK, false>(*problem);
    case 192:
      return launch<192, BFloat16, Major::kK, Major::kK, false>(*problem);
    case 256:
      return launch<256, BFloat16, Major::kK, Major::kK, false>(*problem);
    default:
      return cudaErrorInvalidValue;
  }
}
