// Kernels whose requests of memory can be counted by hand.
#include "m3i/host/launch.h"

namespace {

// Each lane a float, `stride` floats from the next lane's; `offset` floats behind a sector's begin.
__global__ void copy_kernel(const float* from, float* to, int stride, int offset) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  to[i] = from[i * stride + offset];
}

__global__ void copy_vectors_kernel(const float4* from, float4* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  to[i] = from[i];
}

// A matrix [32, 32] of one warp through shared memory, whose rows have `kPitch` floats: the reading
// of a column meets one bank where that is 32.
template <int kPitch>
__global__ void transpose_kernel(const float* from, float* to) {
  __shared__ float tile[32 * kPitch];
  const int lane = threadIdx.x;
  for (int row = 0; row < 32; ++row) tile[row * kPitch + lane] = from[row * 32 + lane];
  __syncthreads();
  for (int row = 0; row < 32; ++row) to[row * 32 + lane] = tile[lane * kPitch + row];
}

// Vectors of 16 bytes, a quarter of the warp at once, then atomic operations on `words` words.
__global__ void shared_kernel(const float4* from, float4* to, int words) {
  __shared__ float4 tile[32];
  __shared__ int counts[32];
  const int lane = threadIdx.x;
  counts[lane] = 0;
  tile[lane] = from[lane];
  __syncthreads();
  atomicAdd(counts + lane % words, 1);
  to[lane] = tile[31 - lane];
}

// Each lane as many steps as its number modulo 4 says, and then some
// atomic operations.
__global__ void diverging_kernel(const float* from, float* sum, int atomics) {
  float mine = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x % 4); ++i) mine += from[i * 32 + threadIdx.x];
  for (int i = 0; i < atomics; ++i) atomicAdd(sum, mine);
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t copy(const float* from, float* to, int blocks, int stride, int offset) {
  return m3i::launch(copy_kernel, blocks, 64, nullptr, from, to, stride, offset);
}

M3I_TEST_API cudaError_t copy_vectors(const float* from, float* to) {
  return m3i::launch(copy_vectors_kernel, 1, 32, nullptr, reinterpret_cast<const float4*>(from),
                     reinterpret_cast<float4*>(to));
}

M3I_TEST_API cudaError_t transpose(const float* from, float* to, int pitch) {
  const auto kernel = pitch == 32 ? transpose_kernel<32> : transpose_kernel<33>;
  return m3i::launch(kernel, 1, 32, nullptr, from, to);
}

M3I_TEST_API cudaError_t through_shared(const float* from, float* to, int words) {
  return m3i::launch(shared_kernel, 1, 32, nullptr, reinterpret_cast<const float4*>(from),
                     reinterpret_cast<float4*>(to), words);
}

M3I_TEST_API cudaError_t diverging(const float* from, float* sum, int atomics) {
  return m3i::launch(diverging_kernel, 1, 32, nullptr, from, sum, atomics);
}
