// boltzmann: the kernels of boltzmann_maxima and boltzmann_sums. Device code only.
#pragma once

#include "boltzmann/sm80/tile.cuh"
#include "m3i/gpu/shared.cuh"

namespace m3i::boltzmann {

// Where patches leave what they found of rows and columns.
struct Partials {
  void* rows;     // [patches across, kinds, whole patches of rows] wide
  void* columns;  // [patches down, kinds, whole patches of columns] wide, or null
};

// A tile of the calling block's patch, counted in it: grid x over the patches across, y over those
// down. Little is kept from tile to tile, since the products leave few registers.
template <class T>
struct PatchTile {
  using A = Accumulator<T>;

  const Blocks& patches;
  int down, across;

  __device__ TileOrigin origin() const {
    return {blockIdx.y * patches.rows + down * Shape<T>::kRows,
            blockIdx.x * patches.columns + across * Shape<T>::kColumns};
  }
  __device__ Line<A> rows(const Partials& partials, int kinds, int kind) const {
    const int64_t line = int64_t{blockIdx.x} * kinds + kind, height = patches.down * patches.rows;
    return {static_cast<A*>(partials.rows) + line * height + origin().row, across == 0};
  }
  __device__ Line<A> columns(const Partials& partials, int kinds, int kind) const {
    if (!partials.columns) return {nullptr};
    const int64_t line = int64_t{blockIdx.y} * kinds + kind;
    const int64_t width = patches.across * patches.columns;
    return {static_cast<A*>(partials.columns) + line * width + origin().column, down == 0};
  }
};

// body(tile) for the tiles of the patch that have rows and columns.
template <class T, class Body>
__device__ inline void for_patch(const Blocks& patches, const BoltzmannInput& input,
                                 const Body& body) {
  PatchTile<T> tile{patches, 0, 0};
#pragma unroll 1
  for (; tile.down * Shape<T>::kRows < patches.rows && tile.origin().row < input.rows;
       ++tile.down) {
    for (tile.across = 0;
         tile.across * Shape<T>::kColumns < patches.columns && tile.origin().column < input.columns;
         ++tile.across) {
      body(tile);
    }
  }
}

// ---- Maxima -------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(Shape<T>::kThreads, 1)
    boltzmann_maxima_kernel(const BoltzmannMaximaParams params, const Blocks patches,
                            const Partials partials) {
  using A = Accumulator<T>;
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  Shared<T>& shared = *dynamic_shared<Shared<T>>();
  VectorsOf<T>& vectors = shared.vectors;
  for_patch<T>(patches, input, [&](const PatchTile<T>& tile) {
    stage_input<false>(vectors, input, tile.origin());
    Fragments<T> c{};
    multiply_features(shared, input, tile.origin(), c);
    const A scale = read_scalar<A>(input.scale);
    fold_tile<Largest>(
        c,
        [&](A dot, int i, int j) {
          const A z = logit(dot, scale, vectors.bias[j]);
          const A value = vectors.row_ids[i] == kIgnored ? minus_infinity<A>() : z;
          return Pair<A>{value, value};
        },
        vectors, tile.rows(partials, 1, 0), tile.columns(partials, 1, 0));
  });
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
__device__ inline void write_zeros(const Line<A>& line, int size) {
  if (!line.first) return;
  for (int i = threadIdx.x; line.to && i < size; i += blockDim.x) line.to[i] = 0;
}

// A tile without positives and ignored rows, as nearly all are, tests nothing of its elements.
template <class T, SumsMode kMode>
__device__ inline void sum_tile(Fragments<T>& c, const SumsTile<VectorsOf<T>, kMode>& values,
                                bool mixed, VectorsOf<T>& vectors, const Partials& partials,
                                const PatchTile<T>& tile) {
  using A = Accumulator<T>;
  for (int i = 0; i < kNumSums * kPasses<kMode>; ++i) {
    const int kind = i / kPasses<kMode>, pass = i % kPasses<kMode>;
    const bool is_last = pass == kPasses<kMode> - 1;
    const Line<A> none{nullptr};
    const Line<A> rows = pass == 0 ? tile.rows(partials, kNumSums, kind) : none;
    const Line<A> columns = is_last ? tile.columns(partials, kNumSums, kind) : none;
    if (!rows.to && !columns.to) continue;
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

template <class T, SumsMode kMode>
__global__ void __launch_bounds__(Shape<T>::kThreads)
    boltzmann_sums_kernel(const BoltzmannSumsParams params, const Blocks patches,
                          const Partials partials) {
  using A = Accumulator<T>;
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  Shared<T>& shared = *dynamic_shared<Shared<T>>();
  VectorsOf<T>& vectors = shared.vectors;
  for_patch<T>(patches, input, [&](const PatchTile<T>& tile) {
    stage_input<true>(vectors, input, tile.origin());
    if constexpr (kMode != SumsMode::kSigmoid) {
      stage_shift(vectors, input, params.shift, tile.origin(), kMode == SumsMode::kExact);
    }
    Fragments<T> c{};
    multiply_features(shared, input, tile.origin(), c);
    const bool mixed = __syncthreads_or(thread_sees_positive(vectors, input, tile.origin()) ||
                                        thread_sees_ignored(vectors));
    const SumsTile<VectorsOf<T>, kMode> values{vectors, read_scalar<A>(input.scale)};
    sum_tile<T, kMode>(c, values, mixed, vectors, partials, tile);
  });
}

}  // namespace m3i::boltzmann
