// Conversions and arithmetic of 16-bit numbers, and what ends a thread, for the tests of the emulator.
#include "m3i/host/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

template <class Small>
__device__ Small narrow(float value);
template <>
__device__ __half narrow(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Small>
__global__ void narrow_kernel(const float* in, Small* out, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) out[i] = narrow<Small>(in[i]);
}

template <class Small>
__global__ void widen_kernel(const Small* in, float* out, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) out[i] = widen(in[i]);
}

// Rows of out: a + b, a - b, a * b, a / b, fma(a, b, a)
template <class Small>
__global__ void arithmetic_kernel(const Small* a, const Small* b, Small* out, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  out[i] = a[i] + b[i];
  out[size + i] = a[i] - b[i];
  out[2 * size + i] = a[i] * b[i];
  out[3 * size + i] = a[i] / b[i];
  out[4 * size + i] = __hfma(a[i], b[i], a[i]);
}

// The thread adds its number to itself `size` times in a recursion, each call with an array of its own.
__device__ __attribute__((noinline)) int descend(int depth, int value) {
  volatile int local[256];
  local[depth % 256] = value;
  if (depth == 0) return local[0];
  return descend(depth - 1, value + local[depth % 256]) + local[depth % 256];
}

__global__ void descend_kernel(int* out, int depth) { out[threadIdx.x] = descend(depth, 1); }

__global__ void divide_kernel(int* out, int divisor) {
  out[threadIdx.x] = static_cast<int>(threadIdx.x) / divisor;
}

// Thread 0 sets a flag for which the others wait; it never comes where `sets` is false.
__global__ void spin_kernel(volatile int* flag, bool sets) {
  if (threadIdx.x > 0) {
    while (*flag == 0) __nanosleep(100);
  } else if (sets) {
    *flag = 1;
  }
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t narrow(const float* in, void* out, int size, bool half) {
  const int blocks = (size + 255) / 256;
  return half ? m3i::launch(narrow_kernel<__half>, blocks, 256, nullptr, in,
                            static_cast<__half*>(out), size)
              : m3i::launch(narrow_kernel<__nv_bfloat16>, blocks, 256, nullptr, in,
                            static_cast<__nv_bfloat16*>(out), size);
}

M3I_TEST_API cudaError_t widen(const void* in, float* out, int size, bool half) {
  const int blocks = (size + 255) / 256;
  return half ? m3i::launch(widen_kernel<__half>, blocks, 256, nullptr,
                            static_cast<const __half*>(in), out, size)
              : m3i::launch(widen_kernel<__nv_bfloat16>, blocks, 256, nullptr,
                            static_cast<const __nv_bfloat16*>(in), out, size);
}

M3I_TEST_API cudaError_t arithmetic(const void* a, const void* b, void* out, int size, bool half) {
  const int blocks = (size + 255) / 256;
  return half ? m3i::launch(arithmetic_kernel<__half>, blocks, 256, nullptr,
                            static_cast<const __half*>(a), static_cast<const __half*>(b),
                            static_cast<__half*>(out), size)
              : m3i::launch(arithmetic_kernel<__nv_bfloat16>, blocks, 256, nullptr,
                            static_cast<const __nv_bfloat16*>(a),
                            static_cast<const __nv_bfloat16*>(b),
                            static_cast<__nv_bfloat16*>(out), size);
}

M3I_TEST_API cudaError_t descend(int* out, int threads, int depth) {
  return m3i::launch(descend_kernel, 1, threads, nullptr, out, depth);
}

M3I_TEST_API cudaError_t divide(int* out, int threads, int divisor) {
  return m3i::launch(divide_kernel, 1, threads, nullptr, out, divisor);
}

M3I_TEST_API cudaError_t spin(int* flag, int threads, bool sets) {
  return m3i::launch(spin_kernel, 1, threads, nullptr, flag, sets);
}
