// Kernels that try what the threads of a block do together, for the tests of the emulator.
#include "m3i/gpu/barrier.cuh"
#include "m3i/gpu/red.cuh"
#include "m3i/gpu/shared.cuh"
#include "m3i/host/launch.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// sums[b] = sum of values[b * width ...]: a warp by shuffles, then its sums through shared memory.
__global__ void __launch_bounds__(kThreads)
    block_sum_kernel(const float* values, float* sums, int width) {
  __shared__ float partial[kWarps];
  const int thread = threadIdx.x;
  float sum = 0.0f;
  for (int i = thread; i < width; i += kThreads) sum += values[blockIdx.x * width + i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += partial[i];
    sums[blockIdx.x] = total;
  }
}

// out[x, y] = in[y, x], in tiles of 32 x 32; a block of 32 x 8 threads.
__global__ void transpose_kernel(const float* in, float* out, int height, int width) {
  __shared__ float tile[32][33];
  const int x = blockIdx.x * 32 + threadIdx.x;
  for (int row = threadIdx.y; row < 32; row += 8) {
    const int y = blockIdx.y * 32 + row;
    if (x < width && y < height) tile[row][threadIdx.x] = in[y * width + x];
  }
  __syncthreads();
  const int out_x = blockIdx.y * 32 + threadIdx.x;
  for (int row = threadIdx.y; row < 32; row += 8) {
    const int out_y = blockIdx.x * 32 + row;
    if (out_x < height && out_y < width) out[out_y * height + out_x] = tile[threadIdx.x][row];
  }
}

// counts[v] += how often v is among the values: a block's own counts in dynamic shared memory.
__global__ void histogram_kernel(const int* values, int num_values, int* counts, int num_bins) {
  int* bins = m3i::dynamic_shared<int>();
  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_values; i += gridDim.x * blockDim.x) {
    atomicAdd(&bins[values[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) atomicAdd(&counts[i], bins[i]);
}

// out[i] = sum of values[0..i] inside each warp: through shared memory, ordered by __syncwarp.
__global__ void warp_scan_kernel(const int* values, int* out) {
  __shared__ int buffer[kThreads];
  const int thread = threadIdx.x, lane = thread % 32;
  int sum = values[blockIdx.x * blockDim.x + thread];
  for (int step = 1; step < 32; step *= 2) {
    buffer[thread] = sum;
    __syncwarp();
    if (lane >= step) sum += buffer[thread - step];
    __syncwarp();
  }
  out[blockIdx.x * blockDim.x + thread] = sum;
}

// Warp 0 fills a buffer, step by step, and warp 1 takes what is in it: `filled` and `taken` are
// named barriers. out[step * 32 + lane] = step * step + lane.
__global__ void __launch_bounds__(64) hand_over_kernel(int* out, int num_steps) {
  constexpr int kFilled = 1, kTaken = 2;
  __shared__ int buffer[32];
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < num_steps; ++step) {
    if (threadIdx.x < 32) {
      if (step > 0) m3i::named_barrier_sync(kTaken, 64);
      buffer[lane] = step * step + lane;
      m3i::named_barrier_arrive(kFilled, 64);
    } else {
      m3i::named_barrier_sync(kFilled, 64);
      out[step * 32 + lane] = buffer[31 - lane] - (31 - lane) + lane;
      if (step + 1 < num_steps) m3i::named_barrier_arrive(kTaken, 64);
    }
  }
}

// out[i] += scale * (4 i ...), as vectors of four.
__global__ void red_kernel(float* out, int size, float scale) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= size) return;
  const float values[4] = {scale * i, scale * (i + 1), scale * (i + 2), scale * (i + 3)};
  m3i::red_add(out + i, values);
}

// Row r of out: what operation r gave each lane. Lanes from `lanes` on return before.
__global__ void warp_operations_kernel(const int* values, int* out, int lanes) {
  const int lane = threadIdx.x, value = values[lane];
  if (lane >= lanes) return;
  const unsigned mask = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  int row = 0;
  const auto put = [&](int result) { out[32 * row++ + lane] = result; };
  put(__shfl_sync(mask, value, 3));
  put(__shfl_sync(mask, value, lane / 2));
  put(__shfl_sync(mask, value, 1, 8));
  put(__shfl_up_sync(mask, value, 3));
  put(__shfl_up_sync(mask, value, 1, 4));
  put(__shfl_xor_sync(mask, value, 2, 4));
  put(__shfl_xor_sync(mask, value, 1));
  put(static_cast<int>(__ballot_sync(mask, value > 0)));
  put(__any_sync(mask, value > 1000));
  put(__all_sync(mask, value > -1000));
  put(static_cast<int>(__match_any_sync(mask, value % 3)));
  int equal = 0;
  put(static_cast<int>(__match_all_sync(mask, value, &equal)));
  put(equal);
  put(__reduce_add_sync(mask, value));
  put(__reduce_min_sync(mask, value));
  put(__reduce_max_sync(mask, value));
  put(static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(value))));
  put(static_cast<int>(__reduce_and_sync(mask, static_cast<unsigned>(value))));
  put(static_cast<int>(__reduce_or_sync(mask, static_cast<unsigned>(value))));
  put(static_cast<int>(__reduce_xor_sync(mask, static_cast<unsigned>(value))));
}

// out: of each thread, __syncthreads_count, _and and _or of values[thread] > limit
__global__ void vote_kernel(const int* values, int* out, int limit) {
  const int thread = threadIdx.x, holds = values[thread] > limit;
  out[3 * thread] = __syncthreads_count(holds);
  out[3 * thread + 1] = __syncthreads_and(holds) != 0;
  out[3 * thread + 2] = __syncthreads_or(holds) != 0;
}

__global__ void idle_kernel() {}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t block_sum(const float* values, float* sums, int rows, int width) {
  return m3i::launch(block_sum_kernel, rows, kThreads, nullptr, values, sums, width);
}

M3I_TEST_API cudaError_t transpose(const float* in, float* out, int height, int width) {
  const dim3 grid((width + 31) / 32, (height + 31) / 32);
  return m3i::launch(transpose_kernel, grid, dim3(32, 8), nullptr, in, out, height, width);
}

M3I_TEST_API cudaError_t histogram(const int* values, int num_values, int* counts, int num_bins,
                                   int blocks) {
  return m3i::launch_with_shared(histogram_kernel, blocks, kThreads, num_bins * sizeof(int),
                                 nullptr, values, num_values, counts, num_bins);
}

M3I_TEST_API cudaError_t warp_scan(const int* values, int* out, int blocks) {
  return m3i::launch(warp_scan_kernel, blocks, kThreads, nullptr, values, out);
}

M3I_TEST_API cudaError_t hand_over(int* out, int num_steps) {
  return m3i::launch(hand_over_kernel, 1, 64, nullptr, out, num_steps);
}

M3I_TEST_API cudaError_t red(float* out, int size, float scale, int blocks) {
  return m3i::launch(red_kernel, blocks, kThreads, nullptr, out, size, scale);
}

M3I_TEST_API cudaError_t warp_operations(const int* values, int* out, int lanes) {
  return m3i::launch(warp_operations_kernel, 1, 32, nullptr, values, out, lanes);
}

M3I_TEST_API cudaError_t vote(const int* values, int* out, int threads, int limit) {
  return m3i::launch(vote_kernel, 1, threads, nullptr, values, out, limit);
}

// A launch with any block size and shared memory, for the limits.
M3I_TEST_API cudaError_t bounded(int grid_y, int threads, int shared_bytes, int* out) {
  return m3i::launch_with_shared(hand_over_kernel, dim3(1, grid_y), threads, shared_bytes, nullptr,
                                 out, 0);
}

// A launch with `asked` bytes of shared memory by the launcher, then one with `taken` beside it, as
// another thread's that has asked before.
M3I_TEST_API cudaError_t after_another(int asked, int taken) {
  const cudaError_t error = m3i::launch_with_shared(idle_kernel, 1, 64, asked, nullptr);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 64;
  config.dynamicSmemBytes = taken;
  return cudaLaunchKernelEx(&config, idle_kernel);
}
