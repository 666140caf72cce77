// boltzmann: the kernels of boltzmann_maxima and boltzmann_sums. Device code only.
#pragma once

#include "boltzmann/sm80/tile.cuh"
#include "m3i/gpu/shared.cuh"

namespace m3i::boltzmann {

// Where the tiles of a block leave what they found of rows and columns.
struct Partials {
  void* rows;     // [column_tiles, kinds, row_tiles * Tile::rows] wide
  void* columns;  // [row_tiles, kinds, column_tiles * Tile::columns] wide, or null
};

// The calling block's place in one of them.
template <class T>
__device__ inline Accumulator<T>* rows_of_tile(const Partials& partials, int kinds, int kind) {
  const int64_t line = (int64_t{blockIdx.x} * kinds + kind) * gridDim.y + blockIdx.y;
  return static_cast<Accumulator<T>*>(partials.rows) + line * Shape<T>::kRows;
}
template <class T>
__device__ inline Accumulator<T>* columns_of_tile(const Partials& partials, int kinds, int kind) {
  if (!partials.columns) return nullptr;
  const int64_t line = (int64_t{blockIdx.y} * kinds + kind) * gridDim.x + blockIdx.x;
  return static_cast<Accumulator<T>*>(partials.columns) + line * Shape<T>::kColumns;
}

// ---- Maxima -------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(Shape<T>::kThreads)
    boltzmann_maxima_kernel(const BoltzmannMaximaParams params, const Block block,
                            const Partials partials) {
  using A = Accumulator<T>;
  if (is_skipped(params.input)) return;
  Shared<T>& shared = *dynamic_shared<Shared<T>>();
  VectorsOf<T>& vectors = shared.vectors;
  const TileOrigin tile = tile_of_block<T>(block);
  stage_input<false>(vectors, params.input, tile);
  Fragments<T> c{};
  multiply_features(shared, params.input, tile, c);
  const A scale = read_scalar<A>(params.input.scale);
  fold_tile<Largest>(
      c,
      [&](A dot, int i, int j) {
        const A z = logit(dot, scale, vectors.bias[j]);
        const A value = vectors.row_ids[i] == kIgnored ? minus_infinity<A>() : z;
        return Pair<A>{value, value};
      },
      vectors, rows_of_tile<T>(partials, 1, 0), columns_of_tile<T>(partials, 1, 0));
}

// ---- Sums ---------------------------------------------------------------------------------------

enum class SumsMode {
  kShared,  // one shift and one exponential for rows and columns
  kExact,   // a shift and an exponential for each
  kSigmoid,
};

// With two shifts rows and columns are summed one after the other: both at once take more registers
// than there are.
template <SumsMode kMode>
inline constexpr int kPasses = kMode == SumsMode::kExact ? 2 : 1;

// Elements of a tile, and what they add to the sum of one kind.
template <class V, SumsMode kMode>
struct SumsTile {
  using A = typename V::A;
  const V& of;
  A scale;

  __device__ A exponential_of(int pass, A c, int i, int j) const {
    if constexpr (kMode == SumsMode::kShared) {
      return exponential(c, scale * static_cast<A>(kLog2E), of.offset[j]);
    } else {
      const A row_shift = of.row_shift[i], column_shift = of.column_shift[j];
      return exponential_from(logit(c, scale, of.bias[j]), pass == 0 ? row_shift : column_shift);
    }
  }

  // Of an element that is negative and whose row is not ignored.
  __device__ Pair<A> negative(int pass, A c, int i, int j) const {
    if constexpr (kMode == SumsMode::kSigmoid) {
      return {softplus(logit(c, scale, of.bias[j]), false), 0};
    } else {
      const A e = exponential_of(pass, c, i, j);
      return {e, e};
    }
  }

  // Of any element.
  __device__ Pair<A> any(int pass, int kind, A c, int i, int j) const {
    const int32_t id = of.row_ids[i];
    const bool positive = id == of.column_ids[j];
    const A one = 1, z = logit(c, scale, of.bias[j]);
    if (id == kIgnored) return {0, 0};
    if constexpr (kMode == SumsMode::kSigmoid) {
      if (kind == kNegatives) return {softplus(z, positive), 0};
      return kind == kCount && positive ? Pair<A>{one, one} : Pair<A>{0, 0};
    } else {
      if (positive != (kind != kNegatives)) return {0, 0};
      if (kind == kCount) return {one, one};
      const A value = kind == kPositiveLogits ? z : exponential_of(pass, c, i, j);
      return {value, value};
    }
  }
};

template <class A>
__device__ inline void write_zeros(A* to, int size) {
  for (int i = threadIdx.x; to && i < size; i += blockDim.x) to[i] = 0;
}

// A tile without positives and ignored rows, as nearly all are, tests nothing of its elements.
template <class T, SumsMode kMode>
__global__ void __launch_bounds__(Shape<T>::kThreads)
    boltzmann_sums_kernel(const BoltzmannSumsParams params, const Block block,
                          const Partials partials) {
  using A = Accumulator<T>;
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  Shared<T>& shared = *dynamic_shared<Shared<T>>();
  VectorsOf<T>& vectors = shared.vectors;
  const TileOrigin tile = tile_of_block<T>(block);
  stage_input<true>(vectors, input, tile);
  if constexpr (kMode != SumsMode::kSigmoid) {
    stage_shift(vectors, input, params.shift, tile, kMode == SumsMode::kExact);
  }
  Fragments<T> c{};
  multiply_features(shared, input, tile, c);
  const SumsTile<VectorsOf<T>, kMode> values{vectors, read_scalar<A>(input.scale)};
  const bool mixed =
      __syncthreads_or(thread_sees_positive(vectors, input, tile) || thread_sees_ignored(vectors));
  for (int i = 0; i < kNumSums * kPasses<kMode>; ++i) {
    const int kind = i / kPasses<kMode>, pass = i % kPasses<kMode>;
    const bool is_last = pass == kPasses<kMode> - 1;
    A* rows = pass == 0 ? rows_of_tile<T>(partials, kNumSums, kind) : nullptr;
    A* columns = is_last ? columns_of_tile<T>(partials, kNumSums, kind) : nullptr;
    if (!rows && !columns) continue;
    if (mixed) {
      fold_tile<Sum>(
          c, [&](A dot, int i, int j) { return values.any(pass, kind, dot, i, j); }, vectors, rows,
          columns);
    } else if (kind == kNegatives) {
      fold_tile<Sum>(
          c, [&](A dot, int i, int j) { return values.negative(pass, dot, i, j); }, vectors, rows,
          columns);
    } else {
      write_zeros(rows, Shape<T>::kRows);
      write_zeros(columns, Shape<T>::kColumns);
    }
  }
}

}  // namespace m3i::boltzmann
