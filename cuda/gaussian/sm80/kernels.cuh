// gaussian: device code. The mathematics stands in params.h.
//
// Forward: z_hat and z are read once, s_p + s_t bytes an element (and s_t written where the
// decorrelation wants the normalised rows), about 8 flops an element: bound by memory. 25 088 rows
// of 768 in bf16 are 77 MB, 23 us at 3.35 TB/s; 0.15 Gflop are 3 us at 60 TFLOP/s. In plain torch
// the same takes a float32 copy, a layer-norm, a difference, a square and a mean: 34 bytes an
// element. Backward: both are read and the gradient written: 116 MB, 34 us, and 39 MB more with a
// pull.
//
// A warp owns a row. Rows of up to kHeldWidth elements stay in registers, at most kHeldWidth / 32
// of them a lane, through the two passes of the moments and that of the distance; of longer ones
// every pass loads again, from cache. Lanes load 16 bytes at once of the wider of the two types;
// element by element where the width or an address does not allow that.
//
// A warp's sum stays in its lanes from row to row; a block leaves one sum, and one block adds
// these. Which rows a warp meets depends on the number of rows alone, so the bits do too. No
// atomics.
#pragma once

#include "gaussian/params.h"
#include "m3i/numbers/vec.cuh"

namespace m3i::gaussian {

// ---- Policy -------------------------------------------------------------------------------------

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;

// Blocks of a sum, at most: eight on each of 132 multiprocessors, and few enough to be added by
// one.
inline constexpr int64_t kMaxBlocks = 1056;

inline constexpr int kHeldWidth = 1024;

// Blocks on a multiprocessor, at least. Held rows take 80 registers, 128 in float64; left to
// choose, ptxas stops at a power of two and spills.
template <class A, bool kHeld>
inline constexpr int kMinBlocks = !kHeld           ? 4
                                  : sizeof(A) == 8 ? 2
                                                   : 3;

// Elements of a lane's access, for rows that allow it.
template <class P, class T>
inline constexpr int kWidest =
    kAccessBytes / static_cast<int>(sizeof(P) > sizeof(T) ? sizeof(P) : sizeof(T));

M3I_HOST_DEVICE constexpr int64_t num_blocks(int64_t size, int64_t of_block) {
  const int64_t blocks = (size + of_block - 1) / of_block;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// `addresses`: those of all arrays, or-ed.
M3I_HOST_DEVICE constexpr int vector_size(int64_t width, int widest, uint64_t addresses) {
  return width % widest == 0 && addresses % kAccessBytes == 0 ? widest : 1;
}

// ---- Device helpers -----------------------------------------------------------------------------

// Over the warp, the same bits in every lane.
template <class A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Over the block, in thread 0.
template <class A>
__device__ inline A block_sum(A value) {
  __shared__ A sums[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i];
  }
  return sum;
}

__device__ inline float inverse_root(float value) { return 1.0f / sqrtf(value); }
__device__ inline double inverse_root(double value) { return 1.0 / sqrt(value); }

// A lane's part of a row.
template <class T, int kVector, bool kHeld>
class RowPart {
  using A = Accumulator<T>;
  static constexpr int kStride = 32 * kVector;
  static constexpr int kSteps = kHeld ? kHeldWidth / kStride : 1;

  const T* row_;
  int64_t width_;
  A held_[kSteps][kVector];

 public:
  __device__ RowPart(const T* row, int64_t width) : row_(row), width_(width) {
    if constexpr (kHeld) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = step * kStride + threadIdx.x % 32 * kVector;
        if (at < width) widen(load<kVector>(row + at), held_[step]);
      }
    }
  }

  // body(place in the row, values) of every vector.
  template <class Body>
  __device__ void each(const Body& body) {
    const int first = threadIdx.x % 32 * kVector;
    if constexpr (kHeld) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = step * kStride + first;
        if (at < width_) body(at, held_[step]);
      }
    } else {
#pragma unroll 2
      for (int64_t at = first; at < width_; at += kStride) {
        widen(load<kVector>(row_ + at), held_[0]);
        body(at, held_[0]);
      }
    }
  }
};

template <class A>
struct Moments {
  A mean, rstd;
};

template <class A, int kVector, class Row>
__device__ inline Moments<A> moments_of(Row& row, int64_t width, double eps) {
  A sum = 0;
  row.each([&](int64_t, const A(&values)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += values[i];
  });
  const A first = warp_sum(sum) / static_cast<A>(width);
  A rests = 0, squares = 0;
  row.each([&](int64_t, const A(&values)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const A rest = values[i] - first;
      rests += rest;
      squares += rest * rest;
    }
  });
  const A shift = warp_sum(rests) / static_cast<A>(width);
  const A variance = warp_sum(squares) / static_cast<A>(width) - shift * shift;
  return {first + shift, inverse_root(variance + static_cast<A>(eps))};
}

// ---- Forward ------------------------------------------------------------------------------------

// Grid: x over groups of kWarps rows, strided.
template <class P, class T, int kVector, bool kHeld>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<Accumulator<P>, kHeld>))
    gaussian_kernel(const GaussianParams params, Accumulator<P>* distances) {
  using A = Accumulator<P>;
  const int64_t width = params.of.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  A sum = 0;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; r < params.of.rows;
       r += stride) {
    const P* z_hat = static_cast<const P*>(params.of.z_hat) + r * width;
    T* normalised = params.normalised ? static_cast<T*>(params.normalised) + r * width : nullptr;
    RowPart<T, kVector, kHeld> row(static_cast<const T*>(params.of.z) + r * width, width);
    Moments<A> moments{0, 1};
    if (params.of.normalise) {
      moments = moments_of<A, kVector>(row, width, params.eps);
      if (threadIdx.x % 32 == 0) {
        static_cast<A*>(params.mean)[r] = moments.mean;
        static_cast<A*>(params.rstd)[r] = moments.rstd;
      }
    }
    row.each([&](int64_t at, const A(&values)[kVector]) {
      A prediction[kVector], target[kVector];
      widen(load<kVector>(z_hat + at), prediction);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        target[i] = (values[i] - moments.mean) * moments.rstd;
        const A distance = target[i] - prediction[i];
        sum += distance * distance;
      }
      if (normalised) store(normalised + at, round_to<T>(target));
    });
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) distances[blockIdx.x] = sum;
}

// Grid: x over groups of kThreads elements of [D, D], strided.
template <class P>
__global__ void __launch_bounds__(kThreads)
    gaussian_product_kernel(const GaussianProductParams params, Accumulator<P>* products) {
  using A = Accumulator<P>;
  const A* of_targets = static_cast<const A*>(params.of_targets);
  const A* of_predictions = static_cast<const A*>(params.of_predictions);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  A sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < params.size;
       i += stride) {
    const A covariance = load_value(of_targets + i) * static_cast<A>(params.scale);
    sum += covariance * load_value(of_predictions + i);
    store_value(static_cast<P*>(params.covariance) + i, covariance);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) products[blockIdx.x] = sum;
}

// One block.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gaussian_value_kernel(const GaussianValueParams params) {
  A distances = 0, products = 0;
  for (int64_t i = threadIdx.x; i < params.num_distances; i += kThreads) {
    distances += load_value(static_cast<const A*>(params.distances) + i);
  }
  for (int64_t i = threadIdx.x; i < params.num_products; i += kThreads) {
    products += load_value(static_cast<const A*>(params.products) + i);
  }
  const A value = block_sum(distances * static_cast<A>(params.distance_scale) +
                            products * static_cast<A>(params.product_scale));
  if (threadIdx.x == 0) *static_cast<A*>(params.value) = value;
}

// ---- Backward -----------------------------------------------------------------------------------

// Grid: x over groups of kWarps rows, strided.
template <class P, class T, int kVector>
__global__ void __launch_bounds__(kThreads) gaussian_bwd_kernel(const GaussianBwdParams params) {
  using A = Accumulator<P>;
  const int64_t width = params.of.width;
  const A grad_out = load_value(static_cast<const A*>(params.grad_out));
  const A distance_scale = grad_out * static_cast<A>(2 * params.distance_scale);
  const A product_scale = grad_out * static_cast<A>(2 * params.product_scale);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; r < params.of.rows;
       r += stride) {
    const P* z_hat = static_cast<const P*>(params.of.z_hat) + r * width;
    const T* z = static_cast<const T*>(params.of.z) + r * width;
    const P* pull = params.pull ? static_cast<const P*>(params.pull) + r * width : nullptr;
    P* grad = static_cast<P*>(params.grad) + r * width;
    const bool normalise = params.of.normalise;
    const A mean = normalise ? load_value(static_cast<const A*>(params.mean) + r) : A(0);
    const A rstd = normalise ? load_value(static_cast<const A*>(params.rstd) + r) : A(1);
#pragma unroll 4
    for (int64_t at = threadIdx.x % 32 * kVector; at < width; at += 32 * kVector) {
      A prediction[kVector], target[kVector], pulled[kVector] = {}, value[kVector];
      widen(load<kVector>(z_hat + at), prediction);
      widen(load<kVector>(z + at), target);
      if (pull) widen(load<kVector>(pull + at), pulled);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        value[i] = (prediction[i] - (target[i] - mean) * rstd) * distance_scale +
                   pulled[i] * product_scale;
      }
      store(grad + at, round_to<P>(value));
    }
  }
}

}  // namespace m3i::gaussian
