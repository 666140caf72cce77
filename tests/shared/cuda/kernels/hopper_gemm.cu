// A product of matrices as kernels for compute capability 9.0 do it, for the tests of the emulator.
//
// D[m, n] = sum over k of A[m, k] B[n, k], in bfloat16, D in float. A block makes 128 x 128 of D:
// one warp fetches 64 of k at a time by tensor copies into a ring of stages, two warpgroups
// multiply 64 rows each, and one group of products is under way while the next one starts. K is a
// multiple of 8; what sticks out is zeros. D's tiles go out by one tensor copy a warpgroup.
#include "m3i/gpu/barrier.cuh"
#include "m3i/host/launch.h"
#include "m3i/host/make_tensor_map.h"
#include "m3i/gpu/shared.cuh"
#include "m3i/gpu/tma.cuh"
#include "m3i/gpu/wgmma.cuh"

namespace {

using m3i::Swizzle;

constexpr int kTile = 128, kTileK = 64, kStages = 3;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kRows = kTile / kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kBox = 32;  // columns of D in a copy: 128 bytes

struct Shared {
  uint16_t a[kStages][kTile * kTileK];
  uint16_t b[kStages][kTile * kTileK];
  float d[kConsumers][kTile / kBox][kRows * kBox];
  m3i::Mbarrier full[kStages], empty[kStages];
};

struct Maps {
  m3i::TensorMap a, b, d;
};

__device__ void produce(Shared& shared, const Maps& maps, int steps) {
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    m3i::mbarrier_wait(&shared.empty[stage], 1 - parity);
    m3i::mbarrier_arrive_expect_tx(&shared.full[stage], 2 * sizeof(shared.a[0]));
    m3i::tma_load_2d(shared.a[stage], maps.a, blockIdx.x * kTile, step * kTileK,
                     &shared.full[stage]);
    m3i::tma_load_2d(shared.b[stage], maps.b, blockIdx.y * kTile, step * kTileK,
                     &shared.full[stage]);
  }
}

// A K-major tile of 64 columns, in 128-byte swizzle, from a row on.
__device__ uint64_t describe(const uint16_t* tile, int row) {
  return m3i::wgmma_descriptor(tile + row * kTileK, 16, 8 * 128, Swizzle::k128);
}

__device__ void multiply(float (&d)[kTile / 2], Shared& shared, int consumer, int steps) {
  m3i::wgmma_fence(d);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    m3i::mbarrier_wait(&shared.full[stage], parity);
    const uint64_t a = describe(shared.a[stage], consumer * kRows);
    const uint64_t b = describe(shared.b[stage], 0);
    m3i::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      m3i::wgmma<kTile, m3i::BFloat16>(d, m3i::wgmma_advance(a, 2 * k),
                                       m3i::wgmma_advance(b, 2 * k));
    }
    m3i::wgmma_commit();
    m3i::wgmma_wait<1>();
    if (step > 0 && threadIdx.x % 128 == 0) {
      m3i::mbarrier_arrive(&shared.empty[(step - 1) % kStages]);
    }
  }
  m3i::wgmma_wait<0>(d);
}

__device__ void store(const float (&d)[kTile / 2], Shared& shared, const Maps& maps, int consumer) {
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    const uint32_t at = ((row + i / 2 % 2 * 8) * kBox + column % kBox) * sizeof(float);
    shared.d[consumer][column / kBox][m3i::swizzled(at, Swizzle::k128) / sizeof(float)] = d[i];
  }
  m3i::fence_proxy_async();
  m3i::named_barrier_sync(1 + consumer, 128);
  if (thread == 0) {
    for (int box = 0; box < kTile / kBox; ++box) {
      m3i::tma_store_2d(maps.d, blockIdx.x * kTile + consumer * kRows,
                        blockIdx.y * kTile + box * kBox, shared.d[consumer][box]);
    }
    m3i::tma_store_commit();
    m3i::tma_store_wait_read<0>();
  }
}

__global__ void __launch_bounds__(kThreads)
    hopper_gemm_kernel(const __grid_constant__ Maps maps, int steps) {
  Shared& shared = *m3i::dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      m3i::mbarrier_init(&shared.full[stage], 1);
      m3i::mbarrier_init(&shared.empty[stage], kConsumers);
    }
    m3i::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (threadIdx.x == 0) produce(shared, maps, steps);
  } else {
    const int consumer = threadIdx.x / 128 - 1;
    float d[kTile / 2] = {};
    multiply(d, shared, consumer, steps);
    store(d, shared, maps, consumer);
  }
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

// d_row: elements from a row of D to the next, a multiple of 4.
M3I_TEST_API cudaError_t hopper_gemm(const uint16_t* a, const uint16_t* b, float* d, int m, int n,
                                     int k, int d_row) {
  using m3i::DType;
  Maps maps;
  const m3i::TiledMatrix matrices[] = {
      {DType::kBFloat16, a, m, k, 2 * k, kTile, kTileK, Swizzle::k128},
      {DType::kBFloat16, b, n, k, 2 * k, kTile, kTileK, Swizzle::k128},
      {DType::kFloat32, d, m, n, 4 * d_row, kRows, kBox, Swizzle::k128}};
  m3i::TensorMap* const made[] = {&maps.a, &maps.b, &maps.d};
  for (int i = 0; i < 3; ++i) {
    const cudaError_t error = m3i::make_tensor_map(made[i], matrices[i]);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid((m + kTile - 1) / kTile, (n + kTile - 1) / kTile);
  return m3i::launch_with_shared(hopper_gemm_kernel, grid, kThreads, sizeof(Shared), nullptr, maps,
                                 (k + kTileK - 1) / kTileK);
}
