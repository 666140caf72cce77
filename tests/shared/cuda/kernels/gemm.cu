// A product of matrices through cp.async, ldmatrix and mma, for the tests of the emulator.
//
// D[m, n] = sum over k of A[m, k] B[n, k], D in float. A block of one warp makes 32 x 16 of D; K is
// brought in two buffers of 32, the next one copied while the tensor cores work on the other. M, N and
// K are any multiples of 8; rows and columns that stick out are zeros.
#include "m3i/gpu/copy_async.cuh"
#include "m3i/host/launch.h"
#include "m3i/gpu/mma.cuh"
#include "m3i/gpu/shared.cuh"

namespace {

constexpr int kTileM = 32, kTileN = 16, kTileK = 32;
constexpr int kRow = kTileK + 8;  // elements; the padding spreads ldmatrix's rows over the banks

struct Tiles {
  uint16_t a[kTileM * kRow];
  uint16_t b[kTileN * kRow];
};

struct Matrices {
  const uint16_t* a;  // [M, K]
  const uint16_t* b;  // [N, K]
  float* d;           // [M, N]
  int m, n, k;
};

// `rows` x kTileK of a matrix of height x width, from (row, column) on.
__device__ void copy_tile(uint16_t* tile, int rows, const uint16_t* matrix, int height, int width,
                          int row, int column) {
  constexpr int kChunk = 8;  // elements of a copy
  for (int i = threadIdx.x; i < rows * kTileK / kChunk; i += 32) {
    const int y = i / (kTileK / kChunk), x = i % (kTileK / kChunk) * kChunk;
    const bool inside = row + y < height && column + x < width;
    const int64_t at = inside ? static_cast<int64_t>(row + y) * width + column + x : 0;
    m3i::copy_async<16>(tile + y * kRow + x, matrix + at, inside);
  }
}

__device__ void copy_tiles(Tiles& tiles, const Matrices& matrices, int k) {
  copy_tile(tiles.a, kTileM, matrices.a, matrices.m, matrices.k, blockIdx.x * kTileM, k);
  copy_tile(tiles.b, kTileN, matrices.b, matrices.n, matrices.k, blockIdx.y * kTileN, k);
  m3i::copy_async_commit();
}

template <bool kHalf>
__device__ void multiply_tiles(const Tiles& tiles, float (&sum)[2][2][4]) {
  const int lane = threadIdx.x;
  for (int k = 0; k < kTileK; k += 16) {
    uint32_t a[2][4], b[4];
    // Rows 0-7 and 8-15 of the lower half of k, then of the upper one
    for (int i = 0; i < 2; ++i) {
      m3i::load_matrices(a[i], tiles.a + (16 * i + lane % 16) * kRow + k + lane / 16 * 8);
    }
    // Both halves of k of columns 0-7, then of 8-15
    m3i::load_matrices(b, tiles.b + (lane / 16 * 8 + lane % 8) * kRow + k + lane / 8 % 2 * 8);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const uint32_t columns[2] = {b[2 * j], b[2 * j + 1]};
        if constexpr (kHalf) {
          m3i::mma_f16(sum[i][j], a[i], columns);
        } else {
          m3i::mma_bf16(sum[i][j], a[i], columns);
        }
      }
    }
  }
}

template <bool kHalf>
__global__ void __launch_bounds__(32) gemm_kernel(const Matrices matrices) {
  Tiles* tiles = m3i::dynamic_shared<Tiles>();
  float sum[2][2][4] = {};
  const int steps = (matrices.k + kTileK - 1) / kTileK;
  copy_tiles(tiles[0], matrices, 0);
  for (int step = 0; step < steps; ++step) {
    copy_tiles(tiles[(step + 1) % 2], matrices, (step + 1) * kTileK);
    m3i::copy_async_wait<1>();
    __syncthreads();
    multiply_tiles<kHalf>(tiles[step % 2], sum);
    __syncthreads();
  }
  const int lane = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = blockIdx.x * kTileM + 16 * i + lane / 4 + e / 2 * 8;
        const int column = blockIdx.y * kTileN + 8 * j + lane % 4 * 2 + e % 2;
        if (row < matrices.m && column < matrices.n) {
          matrices.d[static_cast<int64_t>(row) * matrices.n + column] = sum[i][j][e];
        }
      }
    }
  }
}

// D[16, 8] = A[16, 8] B[8, 8] in tf32, of one warp; B's columns are contiguous.
__global__ void tf32_kernel(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t rows[4], columns[2];
  for (int i = 0; i < 4; ++i) {
    rows[i] = m3i::round_to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  }
  for (int i = 0; i < 2; ++i) columns[i] = m3i::round_to_tf32(b[g * 8 + t + i * 4]);
  float sum[4] = {};
  m3i::mma_tf32(sum, rows, columns);
  for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[e];
}

// out[i] = in[i]^T of 8 x 8 elements, i < 2, by one ldmatrix.
__global__ void transpose_8x8_kernel(const uint16_t* in, uint16_t* out) {
  __shared__ __align__(16) uint16_t tiles[2][8][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) tiles[i / 64][i / 8 % 8][i % 8] = in[i];
  __syncwarp();
  uint32_t words[2];
  m3i::load_matrices<2, true>(words, tiles[lane / 8 % 2][lane % 8]);
  for (int i = 0; i < 2; ++i) {
    uint16_t* row = out + 64 * i + lane / 4 * 8 + lane % 4 * 2;
    row[0] = static_cast<uint16_t>(words[i]);
    row[1] = static_cast<uint16_t>(words[i] >> 16);
  }
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t gemm(const uint16_t* a, const uint16_t* b, float* d, int m, int n, int k,
                              bool half) {
  const dim3 grid((m + kTileM - 1) / kTileM, (n + kTileN - 1) / kTileN);
  return m3i::launch_with_shared(half ? gemm_kernel<true> : gemm_kernel<false>, grid, 32,
                                 2 * sizeof(Tiles), nullptr, Matrices{a, b, d, m, n, k});
}

M3I_TEST_API cudaError_t gemm_tf32(const float* a, const float* b, float* d) {
  return m3i::launch(tf32_kernel, 1, 32, nullptr, a, b, d);
}

M3I_TEST_API cudaError_t transpose_8x8(const uint16_t* in, uint16_t* out) {
  return m3i::launch(transpose_8x8_kernel, 1, 32, nullptr, in, out);
}
