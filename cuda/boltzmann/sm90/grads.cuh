// boltzmann: the kernels of boltzmann_grads on compute capability 9.0. Device code only.
//
// Phase 1 makes C again and puts G in the place of C, in the registers; rounded, it goes to a block
// of 32 MB that stays in the second-level cache. Phase 2 multiplies it by the features on its right
// and, transposed, on its left: wgmma takes operands of which either index is contiguous, so that
// nothing is ever transposed in memory. A thread adds to its elements of the gradients in float32,
// one block of C after the other.
#pragma once

#include "boltzmann/sm80/grads.cuh"
#include "boltzmann/sm90/sums.cuh"

namespace m3i::boltzmann {

// ---- The gradient by the logits -----------------------------------------------------------------

// Slots of columns that are told apart by what is in them: 32 columns of the warp.
inline constexpr int kPartColumns = 8;

using HalfVectors = Vectors<float, kHalfRows, kHopperTile.columns, kWarpgroupWarps, 1>;

struct HopperShared {
  Ring ring;
  HalfVectors halves[kConsumers];
};

// Puts G in C's place in the columns' slots from `first` on, and returns the thread's sum of G C.
template <class Gradient>
__device__ inline float replace_part(Half& c, int first, const Gradient& gradient) {
  const HalfPlace place;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPartColumns; ++i) {
    const int s = first + i;
#pragma unroll
    for (int r = 0; r < HalfPlace::kRows; ++r) {
      float& element = c[HalfPlace::index(r, s)];
      const float g = gradient(element, place.row(r), place.column(s));
      sum = fused(g, element, sum);
      element = g;
    }
  }
  return sum;
}

// G of any element, without a branch: weights and target of both kinds are read, and one is taken.
template <bool kSigmoid>
__device__ inline float mixed_gradient(const GradsTile<HalfVectors, kSigmoid>& values, float dot,
                                       int i, int j) {
  const HalfVectors& of = values.of;
  const bool positive = of.row_ids[i] == of.column_ids[j], ignored = of.row_ids[i] == kIgnored;
  float g = 0;
  if constexpr (kSigmoid) {
    g = softplus_gradient(logit(dot, values.scale, of.bias[j]), positive);
  } else {
    const float as_negative =
        of.row_weights[kNegativeWeight][i] + of.column_weights[kNegativeWeight][j];
    const float as_positive =
        of.row_weights[kPositiveWeight][i] + of.column_weights[kPositiveWeight][j];
    const float target = of.row_weights[kTarget][i] + of.column_weights[kTarget][j];
    const float e = exponential(dot, values.scale * static_cast<float>(kLog2E), of.offset[j]);
    g = e * (positive ? as_positive : as_negative) - (positive ? target : 0.0f);
  }
  return ignored ? 0.0f : g;
}

// Puts G in C's place and returns the thread's sum of G C. Parts without positives and ignored rows
// test nothing of their elements.
template <bool kSigmoid>
__device__ inline float replace_half(Half& c, const GradsTile<HalfVectors, kSigmoid>& values,
                                     const WarpRows& rows, bool exact) {
  constexpr uint32_t kGroupsOfPart = (1u << kPartColumns / 2) - 1;
  const uint32_t mixed = rows.ignored ? ~0u : rows.positives;
  float sum = 0;
#pragma unroll
  for (int first = 0; first < HalfPlace::kColumns; first += kPartColumns) {
    if (exact && !kSigmoid) {
      sum += replace_part(c, first, [&](float dot, int i, int j) {
        return values.template any<!kSigmoid>(dot, i, j);
      });
    } else if (mixed >> first / 2 & kGroupsOfPart) {
      sum += replace_part(
          c, first, [&](float dot, int i, int j) { return mixed_gradient(values, dot, i, j); });
    } else {
      sum += replace_part(c, first, [&](float dot, int i, int j) {
        return values.template negative<false>(dot, i, j);
      });
    }
  }
  return sum;
}

// The sum of the warpgroup's values to *to.
__device__ inline void add_warpgroup(float value, HalfVectors& shared, float* to) {
  const HalfPlace place;
  float* folds = shared.row_folds[0];
#pragma unroll
  for (int bit = 1; bit < kWarpLanes; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  if (place.lane == 0) folds[place.warp] = value;
  sync_warpgroup();
  if (threadIdx.x % kWarpgroupThreads == 0) *to = (folds[0] + folds[1]) + (folds[2] + folds[3]);
}

// Transposes 4 x 4 words of four neighbouring lanes: word i of lane q is afterwards word q of i.
__device__ inline void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t given = upper ? words[i] : words[i | bit];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, given, bit);
      words[i] = upper ? got : words[i];
      words[i | bit] = upper ? words[i | bit] : got;
    }
  }
}

// Rounds G to the inputs' type; zeros where no rows or columns are, since both products read them.
// Four lanes trade their pairs for eight neighbours each: 16 bytes a store, and whole sectors.
template <class T>
__device__ inline void write_half(const Half& g, T* corner, int64_t pitch) {
  const HalfPlace place;
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    T* row = corner + place.row(r) * pitch + place.lane % 4 * 8;
#pragma unroll
    for (int s = 0; s < HalfPlace::kColumns; s += 8) {  // 32 columns of four lanes
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = HalfPlace::index(r, s + 2 * i);
        const float pair[2] = {g[at], g[at + 1]};
        const Vec<T, 2> rounded = round_to<T>(pair);
        memcpy(&words[i], rounded.at, sizeof(rounded));
      }
      transpose_quad(words, place.lane);
      Vec<uint32_t, 4> eight;
      memcpy(eight.at, words, sizeof(words));
      store(reinterpret_cast<uint32_t*>(row + s * 4), eight);
    }
  }
}

// Phase 1: the gradient by a block's logits, and its sums.
template <class T, bool kSigmoid>
__device__ inline void write_half_gradient(Half& c, const BoltzmannGradsParams& params,
                                           const HalfOrigin& half, const GradsScratch& scratch,
                                           const WarpRows& rows, HalfVectors& vectors) {
  const bool exact = !kSigmoid && *params.exact;
  const float scale = read_scalar<float>(params.input.scale);
  if constexpr (kSigmoid) {
    const SumsTile<HalfVectors, SumsMode::kSigmoid> sums{vectors, scale};
    fold_half(
        c, [&](float dot, int i, int j) { return sums.any(0, kNegatives, dot, i, j); }, vectors,
        half.rows_of(scratch.partials, 1, 0), nullptr);
  }
  const float sum = replace_half(c, GradsTile<HalfVectors, kSigmoid>{vectors, scale}, rows, exact);
  add_warpgroup(sum, vectors, half.scale_grad_of(scratch.scale_grads));
  if (scratch.partials.columns) {
    fold_half(
        c, [](float g, int, int) { return Pair<float>{0, g}; }, vectors, nullptr,
        half.columns_of(scratch.partials, 1, 0));
  }
  write_half(c, half.logit_grads_of<T>(scratch.logit_grads), half.width());
}

template <class T, bool kSigmoid>
__global__ void __launch_bounds__(kHopperThreads, 1)
    boltzmann_logit_grads_hopper_kernel(const BoltzmannGradsParams params, const Block block,
                                        const GradsScratch scratch,
                                        const __grid_constant__ TensorMap z_hat,
                                        const __grid_constant__ TensorMap z) {
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  HopperShared& shared = *dynamic_shared<HopperShared>();
  const TileWalk walk = walk_block(block);
  const int steps = static_cast<int>(divide_up(input.width, kBoxSide));
  run_warpgroups(
      shared.ring, [&] { copy_features(shared.ring, walk, z_hat, z, block, steps); },
      [&](int consumer) {
        HalfVectors& vectors = shared.halves[consumer];
        RingPlace place;
        walk([&](int row_tile, int column_tile) {
          const HalfOrigin half(block, row_tile, column_tile, consumer);
          const TileOrigin tile = half.in_c();
          stage_input<true>(vectors, input, tile);
          if constexpr (!kSigmoid) {
            stage_shift(vectors, input, params.shift, tile, *params.exact);
            stage_weights(vectors, input, params.row_weights, params.col_weights, tile);
          }
          sync_warpgroup();
          const WarpRows rows = look_at_rows(vectors, input, tile);
          Half c;
          multiply_half<T, Major::kK, Major::kK>(shared.ring, place, consumer, steps, c);
          write_half_gradient<T, kSigmoid>(c, params, half, scratch, rows, vectors);
        });
      });
}

// ---- The gradients by the features --------------------------------------------------------------

// to (+)= sum, of the half at (row, column) of a matrix of rows x columns, an even number.
__device__ inline void add_half(const Half& sum, void* to, int64_t row, int64_t column,
                                int64_t rows, int64_t columns, bool first) {
  const HalfPlace place;
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    const int64_t y = row + place.row(r);
    if (y >= rows) continue;
#pragma unroll
    for (int s = 0; s < HalfPlace::kColumns; s += 2) {
      const int64_t x = column + place.column(s);
      if (x >= columns) continue;
      const int at = HalfPlace::index(r, s);
      float2* pair = reinterpret_cast<float2*>(static_cast<float*>(to) + y * columns + x);
      const float2 before = first ? float2{0, 0} : *pair;
      *pair = {before.x + sum[at], before.y + sum[at + 1]};
    }
  }
}

// The tiles of phase 2: of grad_z_hat where it is asked for, then of grad_z.
struct FeatureTiles {
  int height, width;        // of the block of C
  int of_rows, of_columns;  // tiles down the gradients
  int across;               // tiles across the features

  __device__ FeatureTiles(const BoltzmannGradsParams& params, const Block& block)
      : height(static_cast<int>(block.row_tiles) * kHopperTile.rows),
        width(static_cast<int>(block.column_tiles) * kHopperTile.columns),
        of_rows(params.grad_z_hat ? height / kHopperTile.rows : 0),
        of_columns(params.grad_z ? width / kHopperTile.rows : 0),
        across(static_cast<int>(divide_up(params.input.width, kHopperTile.columns))) {}

  __device__ TileWalk walk() const { return {(of_rows + of_columns) * across, across}; }
  __device__ bool is_of_rows(int down) const { return down < of_rows; }
  // The first row (or column) of C that the thread block adds to, in the block of C.
  __device__ int first(int down) const {
    return (is_of_rows(down) ? down : down - of_rows) * kHopperTile.rows + block_row();
  }
};

// A warpgroup's half of such a tile.
template <class T>
__device__ inline void add_feature_grads(const BoltzmannGradsParams& params, const Block& block,
                                         const FeatureTiles& tiles, int down, int feature_tile,
                                         Ring& ring, RingPlace& place, int consumer) {
  const BoltzmannInput& input = params.input;
  const int64_t column = int64_t{feature_tile} * kHopperTile.columns;
  const int row = tiles.first(down) + consumer * kHalfRows;
  Half sum;
  if (tiles.is_of_rows(down)) {
    multiply_half<T, Major::kK, Major::kMN>(ring, place, consumer, tiles.width / kBoxSide, sum);
    add_half(sum, params.grad_z_hat, block.row_begin + row, column, input.rows, input.width,
             block.column_begin == 0);
  } else {
    multiply_half<T, Major::kMN, Major::kMN>(ring, place, consumer, tiles.height / kBoxSide, sum);
    add_half(sum, params.grad_z, block.column_begin + row, column, input.columns, input.width,
             block.row_begin == 0);
  }
}

// Phase 2: grad_z_hat (+)= G z of the block's rows, and grad_z (+)= G^T z_hat of its columns. One
// thread adds to an element in each launch, and launches follow one another: always the same bits.
template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    boltzmann_feature_grads_hopper_kernel(const BoltzmannGradsParams params, const Block block,
                                          const __grid_constant__ TensorMap logit_grads,
                                          const __grid_constant__ TensorMap z_hat,
                                          const __grid_constant__ TensorMap z) {
  if (is_skipped(params.input)) return;
  Ring& ring = dynamic_shared<HopperShared>()->ring;
  const FeatureTiles tiles(params, block);
  run_warpgroups(
      ring,
      [&] {
        RingPlace place;
        tiles.walk()([&](int down, int feature_tile) {
          const int first = tiles.first(down), column = feature_tile * kHopperTile.columns;
          if (tiles.is_of_rows(down)) {
            const int depth = static_cast<int>(block.column_begin);
            copy_operands<Major::kK, Major::kMN>(
                ring, place, {logit_grads, z, first, 0, column, depth, tiles.width / kBoxSide});
          } else {
            const int depth = static_cast<int>(block.row_begin);
            copy_operands<Major::kMN, Major::kMN>(
                ring, place,
                {logit_grads, z_hat, first, 0, column, depth, tiles.height / kBoxSide});
          }
        });
      },
      [&](int consumer) {
        RingPlace place;
        tiles.walk()([&](int down, int feature_tile) {
          add_feature_grads<T>(params, block, tiles, down, feature_tile, ring, place, consumer);
        });
      });
}

}  // namespace m3i::boltzmann
