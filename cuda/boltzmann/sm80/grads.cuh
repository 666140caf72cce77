// boltzmann: the kernels of boltzmann_grads. Device code only.
#pragma once

#include "boltzmann/sm80/sums.cuh"

namespace m3i::boltzmann {

// What the tiles of a block leave to the kernels after them.
struct GradsScratch {
  void* logit_grads;  // [row_tiles * Tile::rows, column_tiles * Tile::columns], in the inputs' type
  void* scale_grads;  // [row_tiles * column_tiles] wide
  Partials partials;  // rows: of values; columns: of the gradient by the bias; or null
};

// The calling thread block's place in one of the partial sums of a block of C, whose tiles are the
// grid: [column_tiles, rows] and [row_tiles, columns].
template <class T>
__device__ inline Line<Accumulator<T>> rows_of_tile(const Partials& partials) {
  const int64_t tile = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
  return {static_cast<Accumulator<T>*>(partials.rows) + tile * Shape<T>::kRows};
}
template <class T>
__device__ inline Line<Accumulator<T>> columns_of_tile(const Partials& partials) {
  const int64_t tile = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  return {static_cast<Accumulator<T>*>(partials.columns) + tile * Shape<T>::kColumns};
}

// ---- The gradient by the logits -----------------------------------------------------------------

template <class V, bool kSigmoid>
struct GradsTile {
  using A = typename V::A;
  const V& of;
  A scale;

  // E w of the row plus that of the column, of one shift or two.
  template <bool kExact>
  __device__ A weighted(A c, int i, int j, int kind) const {
    const A row_weight = of.row_weights[kind][i], column_weight = of.column_weights[kind][j];
    if constexpr (kExact) {
      const A z = logit(c, scale, of.bias[j]);
      return fused(exponential_from(z, of.row_shift[i]), row_weight,
                   exponential_from(z, of.column_shift[j]) * column_weight);
    } else {
      return exponential(c, scale * static_cast<A>(kLog2E), of.offset[j]) *
             (row_weight + column_weight);
    }
  }

  // G of an element that is negative and whose row is not ignored.
  template <bool kExact>
  __device__ A negative(A c, int i, int j) const {
    if constexpr (kSigmoid) {
      return softplus_gradient(logit(c, scale, of.bias[j]), false);
    } else {
      return weighted<kExact>(c, i, j, kNegativeWeight);
    }
  }

  // G of any element.
  template <bool kExact>
  __device__ A any(A c, int i, int j) const {
    const int32_t id = of.row_ids[i];
    const bool positive = id == of.column_ids[j];
    if (id == kIgnored) return 0;
    if constexpr (kSigmoid) {
      return softplus_gradient(logit(c, scale, of.bias[j]), positive);
    } else {
      const int kind = positive ? kPositiveWeight : kNegativeWeight;
      const A target = of.row_weights[kTarget][i] + of.column_weights[kTarget][j];
      return weighted<kExact>(c, i, j, kind) - (positive ? target : A{0});
    }
  }
};

// Puts G in C's place and returns the calling thread's sum of G C.
template <class T, class Gradient>
__device__ inline Accumulator<T> replace_by_gradient(Fragments<T>& c, const Gradient& gradient) {
  const Place<T> place;
  Accumulator<T> sum = 0;
#pragma unroll
  for (int s = 0; s < Shape<T>::kLaneColumns; ++s) {
#pragma unroll
    for (int r = 0; r < Shape<T>::kLaneRows; ++r) {
      const Accumulator<T> g = gradient(c(r, s), place.row(r), place.column(s));
      sum = fused(g, c(r, s), sum);
      c(r, s) = g;
    }
  }
  return sum;
}

// The sum of all threads' values to *to; `folds` holds one of each warp.
template <class A>
__device__ inline void add_threads(A value, A* folds, A* to) {
#pragma unroll
  for (int bit = 1; bit < kWarpLanes; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  if (threadIdx.x % kWarpLanes == 0) folds[threadIdx.x / kWarpLanes] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    A sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarpLanes; ++warp) sum += folds[warp];
    *to = sum;
  }
  __syncthreads();
}

// Rounds G to the inputs' type; zeros where no rows or columns are, since both products read them.
template <class T>
__device__ inline void write_gradient(Fragments<T>& g, void* to) {
  const Place<T> place;
  const int64_t pitch = gridDim.x * int64_t{Shape<T>::kColumns};
  T* corner = static_cast<T*>(to) + blockIdx.y * pitch * Shape<T>::kRows +
              blockIdx.x * int64_t{Shape<T>::kColumns};
#pragma unroll
  for (int r = 0; r < Shape<T>::kLaneRows; ++r) {
#pragma unroll
    for (int s = 0; s < Shape<T>::kLaneColumns; s += 2) {
      const Accumulator<T> pair[2] = {g(r, s), g(r, s + 1)};
      store(corner + place.row(r) * pitch + place.column(s), round_to<T>(pair));
    }
  }
}

template <class T, bool kSigmoid>
__device__ inline Accumulator<T> replace_by_gradient(
    Fragments<T>& c, const GradsTile<VectorsOf<T>, kSigmoid>& values, bool mixed, bool exact) {
  using A = Accumulator<T>;
  if (exact && !kSigmoid) {
    return replace_by_gradient(
        c, [&](A dot, int i, int j) { return values.template any<!kSigmoid>(dot, i, j); });
  }
  if (mixed) {
    return replace_by_gradient(
        c, [&](A dot, int i, int j) { return values.template any<false>(dot, i, j); });
  }
  return replace_by_gradient(
      c, [&](A dot, int i, int j) { return values.template negative<false>(dot, i, j); });
}

// Phase 1: the gradient by a block's logits, and its sums.
template <class T, bool kSigmoid>
__global__ void __launch_bounds__(Shape<T>::kThreads)
    boltzmann_logit_grads_kernel(const BoltzmannGradsParams params, const Block block,
                                 const GradsScratch scratch) {
  using A = Accumulator<T>;
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  Shared<T>& shared = *dynamic_shared<Shared<T>>();
  VectorsOf<T>& vectors = shared.vectors;
  const TileOrigin tile = tile_of_block<T>(block);
  const bool exact = !kSigmoid && *params.exact;
  stage_input<true>(vectors, input, tile);
  if constexpr (!kSigmoid) {
    stage_shift(vectors, input, params.shift, tile, exact);
    stage_weights(vectors, input, params.row_weights, params.col_weights, tile);
  }
  Fragments<T> c{};
  multiply_features(shared, input, tile, c);
  const bool mixed =
      __syncthreads_or(thread_sees_positive(vectors, input, tile) || thread_sees_ignored(vectors));
  const A scale = read_scalar<A>(input.scale);
  if constexpr (kSigmoid) {
    const SumsTile<VectorsOf<T>, SumsMode::kSigmoid> sums{vectors, scale};
    fold_tile<Sum>(
        c, [&](A dot, int i, int j) { return sums.any(0, kNegatives, dot, i, j); }, vectors,
        rows_of_tile<T>(scratch.partials), Line<A>{nullptr});
  }
  const A sum =
      replace_by_gradient(c, GradsTile<VectorsOf<T>, kSigmoid>{vectors, scale}, mixed, exact);
  A* scale_grads = static_cast<A*>(scratch.scale_grads);
  add_threads(sum, vectors.row_folds[0],
              scale_grads + blockIdx.y * int64_t{gridDim.x} + blockIdx.x);
  if (scratch.partials.columns) {
    fold_tile<Sum>(
        c, [](A g, int, int) { return Pair<A>{0, g}; }, vectors, Line<A>{nullptr},
        columns_of_tile<T>(scratch.partials));
  }
  write_gradient(c, scratch.logit_grads);
}

// ---- The gradients by the features --------------------------------------------------------------

// to (+)= sum, of the tile at (row, column) of a matrix of rows x columns; two neighbours in one
// access where each row starts at a multiple of their size.
template <class T>
__device__ inline void add_tile(Fragments<T>& sum, void* to, int64_t row, int64_t column,
                                int64_t rows, int64_t columns, bool first) {
  using A = Accumulator<T>;
  using Two = Vec<A, 2>;
  const Place<T> place;
  const bool in_twos = columns % 2 == 0;
#pragma unroll
  for (int r = 0; r < Shape<T>::kLaneRows; ++r) {
    const int64_t y = row + place.row(r);
    if (y >= rows) continue;
#pragma unroll
    for (int s = 0; s < Shape<T>::kLaneColumns; s += 2) {
      const int64_t x = column + place.column(s);
      if (x >= columns) continue;
      A* at = static_cast<A*>(to) + y * columns + x;
      if (in_twos) {
        const Two before = first ? Two{} : *reinterpret_cast<const Two*>(at);
        store(at, Two{{before.at[0] + sum(r, s), before.at[1] + sum(r, s + 1)}});
      } else {
        at[0] = first ? sum(r, s) : at[0] + sum(r, s);
        if (x + 1 < columns) at[1] = first ? sum(r, s + 1) : at[1] + sum(r, s + 1);
      }
    }
  }
}

// Phase 2: grad_z_hat (+)= G z of the block's rows, and grad_z (+)= G^T z_hat of its columns. One
// thread adds to an element in each launch, and launches follow one another: always the same bits.
// Grid: x over the tiles of the width, y over the row tiles where grad_z_hat is asked for, then
// over the column tiles where grad_z is.
template <class T>
__global__ void __launch_bounds__(Shape<T>::kThreads)
    boltzmann_feature_grads_kernel(const BoltzmannGradsParams params, const Block block,
                                   const void* logit_grads) {
  using S = Shape<T>;
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  Shared<T>& shared = *dynamic_shared<Shared<T>>();
  const int64_t height = block.row_tiles * S::kRows, width = block.column_tiles * S::kColumns;
  const Operand<T> g = make_operand<T>(logit_grads, height, width);
  const int64_t column = int64_t{blockIdx.x} * S::kColumns;
  const int64_t row_tiles = params.grad_z_hat ? block.row_tiles : 0;
  Fragments<T> sum{};
  if (blockIdx.y < row_tiles) {
    const int64_t row = int64_t{blockIdx.y} * S::kRows;
    Operand<T> z = make_operand<T>(input.z, input.columns, input.width);
    z.from += block.column_begin * z.pitch;
    z.rows -= block.column_begin;
    multiply<T, true, false>(shared.stages, g, row, z, column, width, sum);
    add_tile(sum, params.grad_z_hat, block.row_begin + row, column, input.rows, input.width,
             block.column_begin == 0);
  } else {
    const int64_t row = (blockIdx.y - row_tiles) * S::kRows;
    Operand<T> z_hat = make_operand<T>(input.z_hat, input.rows, input.width);
    z_hat.from += block.row_begin * z_hat.pitch;
    z_hat.rows -= block.row_begin;
    multiply<T, false, false>(shared.stages, g, row, z_hat, column, height, sum);
    add_tile(sum, params.grad_z, block.column_begin + row, column, input.columns, input.width,
             block.row_begin == 0);
  }
}

}  // namespace m3i::boltzmann
