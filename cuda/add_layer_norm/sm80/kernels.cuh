// add_layer_norm: device code. The mathematics stands in params.h.
//
// Forward: x and the branch are read once, their sum and the norm written once, in float32 beside
// bf16 4 + 2 + 4 + 2 bytes an element and about 8 flops: bound by memory. 1,576 rows of 384 (8
// pictures of ViT-S) are 7 MB, 2.2 us at 3.35 TB/s. torch takes three launches and 28 bytes.
// Backward: both gradients and the sum are read, the stream's gradient and the branch's written: 16
// bytes; torch takes five launches and 42 bytes.
//
// A block owns kRows rows at a time, a thread the same places of every row that its block meets, so
// that a row stays in registers between its reductions, and sums over rows by weight and bias do
// from row to row. A block leaves these in `partials`, which a second launch adds. Which rows a
// block meets depends on their number alone, and so do the bits. No atomics.
#pragma once

#include "add_layer_norm/params.h"
#include "m3i/numbers/vec.cuh"

namespace m3i::add_layer_norm {

// ---- Policy -------------------------------------------------------------------------------------

inline constexpr int kMaxWarps = 32;

// Threads of a block, at most: with more, registers of doubles would spill.
template <class X>
inline constexpr int kMaxThreads = sizeof(X) == 8 ? 512 : 1024;

// Blocks with partial sums, at most: four on each of 132 multiprocessors. More would hide more
// latency, and leave more for the second launch to add.
inline constexpr int64_t kMaxPartials = 528;

// Columns of a block of the second launch, and rows of partial sums that it adds at once.
inline constexpr int kColumns = 32;

// Elements of a lane's access: 16 bytes of the stream, 8 of the halves.
template <class X>
inline constexpr int kWidest = sizeof(X) == 8 ? 2 : 4;

// Rows of a block at a time: two reductions share their barriers.
template <class X>
inline constexpr int kRows = sizeof(X) == 8 ? 1 : 2;

// Accesses of a thread to a row, at most.
template <class X, int kVector>
inline constexpr int kSteps = static_cast<int>(kAddLayerNormWidth) / (kMaxThreads<X> * kVector);

template <class X, int kVector>
M3I_HOST_DEVICE constexpr int num_threads(int64_t width) {
  const int64_t threads = (width + 32 * kVector - 1) / (32 * kVector) * 32;
  return threads < kMaxThreads<X> ? static_cast<int>(threads) : kMaxThreads<X>;
}

// `addresses`: those of all arrays, or-ed.
M3I_HOST_DEVICE constexpr int vector_size(int64_t width, int widest, uint64_t addresses) {
  return width % widest == 0 && addresses % kAccessBytes == 0 ? widest : 1;
}

// ---- Device helpers -----------------------------------------------------------------------------

template <class A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Over the block, the same bits in every thread. `shared` is not that of the call before.
template <class A, int kCount>
__device__ inline void block_sums(A (&values)[kCount], A (&shared)[kCount][kMaxWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) shared[i][warp] = values[i];
  }
  __syncthreads();
  const bool has_warp = lane < static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(has_warp ? shared[i][lane] : A(0));
}

__device__ inline float inverse_root(float value) { return 1.0f / sqrtf(value); }
__device__ inline double inverse_root(double value) { return 1.0 / sqrt(value); }

// body(place in a row, step) of every access of this thread.
template <class X, int kVector, class Body>
__device__ inline void each_access(int64_t width, const Body& body) {
#pragma unroll
  for (int step = 0; step < kSteps<X, kVector>; ++step) {
    const int at = (step * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
    if (at < width) body(at, step);
  }
}

// A thread's part of a vector [D].
template <class X, int kVector>
__device__ inline void load_columns(const Accumulator<X>* from, int64_t width,
                                    Accumulator<X> (&to)[kSteps<X, kVector>][kVector]) {
  each_access<X, kVector>(width,
                          [&](int at, int step) { widen(load<kVector>(from + at), to[step]); });
}

// ---- Forward ------------------------------------------------------------------------------------

// Grid: x over groups of kRows rows, strided.
template <class X, class P, int kVector>
__global__ void __launch_bounds__(kMaxThreads<X>)
    add_layer_norm_kernel(const AddLayerNormParams params) {
  using A = Accumulator<X>;
  __shared__ A shared[2][kRows<X>][kMaxWarps];
  const int64_t width = params.of.width, rows = params.of.rows;
  A weight[kSteps<X, kVector>][kVector], bias[kSteps<X, kVector>][kVector];
  load_columns<X, kVector>(static_cast<const A*>(params.weight), width, weight);
  load_columns<X, kVector>(static_cast<const A*>(params.bias), width, bias);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows<X>;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows<X>; first < rows; first += stride) {
    A values[kRows<X>][kSteps<X, kVector>][kVector], mean[kRows<X>] = {}, rstd[kRows<X>] = {};
#pragma unroll
    for (int i = 0; i < kRows<X>; ++i) {
      const int64_t offset = (first + i) * width;
      if (first + i < rows) {
        each_access<X, kVector>(width, [&](int at, int step) {
          widen(load<kVector>(static_cast<const X*>(params.x) + offset + at), values[i][step]);
          if (params.branch) {
            A added[kVector];
            widen(load<kVector>(static_cast<const P*>(params.branch) + offset + at), added);
#pragma unroll
            for (int j = 0; j < kVector; ++j) values[i][step][j] += added[j];
            const auto rounded = round_to<X>(values[i][step]);
            store(static_cast<X*>(params.sum) + offset + at, rounded);
            widen(rounded, values[i][step]);
          }
#pragma unroll
          for (int j = 0; j < kVector; ++j) mean[i] += values[i][step][j];
        });
      }
    }
    block_sums(mean, shared[0]);
#pragma unroll
    for (int i = 0; i < kRows<X>; ++i) {
      mean[i] /= static_cast<A>(width);
      each_access<X, kVector>(width, [&](int, int step) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          values[i][step][j] -= mean[i];
          rstd[i] += values[i][step][j] * values[i][step][j];
        }
      });
    }
    block_sums(rstd, shared[1]);
#pragma unroll
    for (int i = 0; i < kRows<X>; ++i) {
      if (first + i >= rows) continue;
      rstd[i] = inverse_root(rstd[i] / static_cast<A>(width) + static_cast<A>(params.eps));
      P* normed = static_cast<P*>(params.normed) + (first + i) * width;
      each_access<X, kVector>(width, [&](int at, int step) {
        A value[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          value[j] = values[i][step][j] * rstd[i] * weight[step][j] + bias[step][j];
        }
        store(normed + at, round_to<P>(value));
      });
      if (threadIdx.x == 0) {
        store_value(static_cast<A*>(params.mean) + first + i, mean[i]);
        store_value(static_cast<A*>(params.rstd) + first + i, rstd[i]);
      }
    }
  }
}

// ---- Backward -----------------------------------------------------------------------------------

// Grid: x over groups of kRows rows, strided.
template <class X, class P, int kVector>
__global__ void __launch_bounds__(kMaxThreads<X>)
    add_layer_norm_bwd_kernel(const AddLayerNormBwdParams params) {
  using A = Accumulator<X>;
  __shared__ A shared[2][2 * kRows<X>][kMaxWarps];
  const int64_t width = params.of.width, rows = params.of.rows;
  A of_weight[kSteps<X, kVector>][kVector] = {}, of_bias[kSteps<X, kVector>][kVector] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows<X>;
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows<X>; first < rows; first += stride) {
    // g w and n, and their means: those of g w first, those of g w n after them
    A pulled[kRows<X>][kSteps<X, kVector>][kVector], unit[kRows<X>][kSteps<X, kVector>][kVector];
    A means[2 * kRows<X>] = {}, rstd[kRows<X>] = {};
#pragma unroll
    for (int i = 0; i < kRows<X>; ++i) {
      if (first + i >= rows) continue;
      const int64_t offset = (first + i) * width;
      const A mean = load_value(static_cast<const A*>(params.mean) + first + i);
      rstd[i] = load_value(static_cast<const A*>(params.rstd) + first + i);
      each_access<X, kVector>(width, [&](int at, int step) {
        widen(load<kVector>(static_cast<const X*>(params.sum) + offset + at), unit[i][step]);
        widen(load<kVector>(static_cast<const P*>(params.grad_normed) + offset + at),
              pulled[i][step]);
        A weight[kVector];  // from cache: kept, those of double would spill
        widen(load<kVector>(static_cast<const A*>(params.weight) + at), weight);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          unit[i][step][j] = (unit[i][step][j] - mean) * rstd[i];
          of_weight[step][j] += pulled[i][step][j] * unit[i][step][j];
          of_bias[step][j] += pulled[i][step][j];
          pulled[i][step][j] *= weight[j];
          means[i] += pulled[i][step][j];
          means[kRows<X> + i] += pulled[i][step][j] * unit[i][step][j];
        }
      });
    }
    block_sums(means, shared[turn]);
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kRows<X>; ++i) {
      if (first + i >= rows) continue;
      const int64_t offset = (first + i) * width;
      const A shift = means[i] / static_cast<A>(width);
      const A along = means[kRows<X> + i] / static_cast<A>(width);
      each_access<X, kVector>(width, [&](int at, int step) {
        A value[kVector] = {};
        if (params.grad_sum) {
          widen(load<kVector>(static_cast<const X*>(params.grad_sum) + offset + at), value);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          value[j] += rstd[i] * (pulled[i][step][j] - shift - unit[i][step][j] * along);
        }
        store(static_cast<X*>(params.grad_x) + offset + at, round_to<X>(value));
        if (params.grad_branch) {
          store(static_cast<P*>(params.grad_branch) + offset + at, round_to<P>(value));
        }
      });
    }
  }
  if (!params.partials) return;
  A* partials = static_cast<A*>(params.partials) + static_cast<int64_t>(blockIdx.x) * 2 * width;
  each_access<X, kVector>(width, [&](int at, int step) {
    store(partials + at, round_to<A>(of_weight[step]));
    store(partials + width + at, round_to<A>(of_bias[step]));
  });
}

// Grid: x over groups of kColumns of the 2 D columns. Block: kColumns x kColumns.
template <class A>
__global__ void __launch_bounds__(kColumns* kColumns)
    add_layer_norm_affine_kernel(const AddLayerNormAffineParams params) {
  __shared__ A shared[kColumns][kColumns + 1];
  const int lane = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  const int64_t width = params.width;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  A sum = 0;
  if (column < 2 * width) {
#pragma unroll 4
    for (int64_t block = part; block < params.blocks; block += kColumns) {
      sum += load_value(static_cast<const A*>(params.partials) + block * 2 * width + column);
    }
  }
  shared[part][lane] = sum;
  __syncthreads();
  sum = warp_sum(shared[lane][part]);  // of the column `part` of the block
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kColumns + part;
  if (lane != 0 || own >= 2 * width) return;
  A* to = own < width ? static_cast<A*>(params.grad_weight) + own
                      : static_cast<A*>(params.grad_bias) + own - width;
  store_value(to, sum);
}

}  // namespace m3i::add_layer_norm
