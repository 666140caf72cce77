// Kernels whose machine code was read by hand, as kernels.sass has it; of no op.

__global__ void loops_kernel(const float* x, float* out, int rows, int columns) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
#pragma unroll 1
    for (int j = 0; j < columns; ++j) sum += x[j];
    if (sum < 0) {
      sum = sqrtf(sum) + cosf(sum);
    }
  }
  out[threadIdx.x] = sum;
}

__global__ void vectors_kernel(const float4* x, const unsigned char* bytes, float4* out) {
  const int i = threadIdx.x;
  const float4 a = x[i], b = x[i + 32], c = x[i + 64], d = x[i + 96];
  const float byte = bytes[i];
  out[i] = make_float4(a.x + b.x, a.y + b.y, a.z + c.z, c.w + d.w * byte);
}

__global__ void atomics_kernel(float* sums, unsigned* most, unsigned long long* both, int* found) {
  __shared__ int shared;
  if (threadIdx.x == 0) shared = 0;
  __syncthreads();
  atomicAdd(sums, 1.5f);
  atomicMax(most, threadIdx.x);
  atomicAdd(both, 3ull);
  found[threadIdx.x] = atomicCAS(found + 64, 1, 2);
  atomicAdd(&shared, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) found[0] = shared;
}

template <int kLanes>
__global__ void shuffles_kernel(float* x) {
  float sum = x[threadIdx.x];
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  x[threadIdx.x] = sum;
}
template __global__ void shuffles_kernel<32>(float*);

__global__ void divisions_kernel(const long long* a, long long* b, int count) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) b[i] = a[i] / b[i];
}
