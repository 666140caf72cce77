// boltzmann: the kernel of boltzmann_sums on compute capability 9.0. Device code only.
//
// Logits, exponentials and sums over rows and columns all happen in the registers that the product
// left them in, in one pass for all tiles: positives are few, and their sums are taken before it,
// from the groups of eight columns in which the warp has some. What is no negative is muted then:
// its dot product becomes the number whose exponential is zero. A thread has two rows: their sums
// take two shuffles each. Its 64 columns are folded 16 at a time by exchanging halves, 14 shuffles
// each time and 56 for all.
#pragma once

#include "boltzmann/sm80/sums.cuh"
#include "boltzmann/sm90/positives.cuh"

namespace m3i::boltzmann {

struct SumsHalf {
  SumsVectors vectors;
  bool positives[kWarpgroupWarps];  // which warps have some
};

struct SumsShared {
  Ring ring;
  SumsHalf halves[kConsumers];
};

// The tiles of a block of C that a cluster takes, one after the other.
struct TileWalk {
  int tiles, across;

  template <class Body>
  __device__ void operator()(const Body& body) const {
    const int clusters = gridDim.x / kClusterBlocks;
    for (int i = blockIdx.x / kClusterBlocks; i < tiles; i += clusters) {
      body(i / across, i % across);
    }
  }
};

// The first row in the tile of the thread block's part.
__device__ inline int block_row() { return static_cast<int>(cluster_rank()) * kBlockRows; }

__device__ inline TileWalk walk_block(const Block& block) {
  const int across = static_cast<int>(block.column_tiles);
  return {static_cast<int>(block.row_tiles) * across, across};
}

// A warpgroup's half of a tile of a block of C, and where it writes what it found.
struct HalfOrigin {
  static constexpr int kColumns = kHopperTile.columns;

  const Block& block;
  int half, column_tile;  // counted in halves and in tiles

  __device__ HalfOrigin(const Block& block, int row_tile, int column_tile, int consumer)
      : block(block),
        half((row_tile * kHopperTile.rows + block_row()) / kHalfRows + consumer),
        column_tile(column_tile) {}

  __device__ int64_t height() const { return block.row_tiles * kHopperTile.rows; }
  __device__ int64_t width() const { return block.column_tiles * kColumns; }
  __device__ TileOrigin in_c() const {
    return {block.row_begin + half * kHalfRows, block.column_begin + column_tile * kColumns};
  }
  __device__ float* rows_of(const Partials& partials, int kinds, int kind) const {
    const int64_t line = column_tile * kinds + kind;
    return static_cast<float*>(partials.rows) + line * height() + half * kHalfRows;
  }
  __device__ float* columns_of(const Partials& partials, int kinds, int kind) const {
    if (!partials.columns) return nullptr;
    const int64_t line = half * kinds + kind;
    return static_cast<float*>(partials.columns) + line * width() + column_tile * kColumns;
  }
  __device__ float* scale_grad_of(void* scale_grads) const {
    return static_cast<float*>(scale_grads) + half * block.column_tiles + column_tile;
  }
  // The corner of G, of width() a row.
  template <class T>
  __device__ T* logit_grads_of(void* logit_grads) const {
    return static_cast<T*>(logit_grads) + half * kHalfRows * width() + column_tile * kColumns;
  }
};

// By the thread that copies: the features of all tiles' rows and columns, for their dot products.
__device__ inline void copy_features(Ring& ring, const TileWalk& walk, const TensorMap& z_hat,
                                     const TensorMap& z, const Block& block, int steps) {
  RingPlace place;
  walk([&](int row_tile, int column_tile) {
    const int row = static_cast<int>(block.row_begin) + row_tile * kHopperTile.rows + block_row();
    const int column = static_cast<int>(block.column_begin) + column_tile * kHopperTile.columns;
    copy_operands<Major::kK, Major::kK>(ring, place, {z_hat, z, row, 0, column, 0, steps});
  });
}

// Adds value(c, i, j) of all elements up over rows and over columns of the half, to rows[0, 64) and
// columns[0, 256) in global memory; nothing where one is null.
template <class V, class Value>
__device__ inline void fold_half(const Half& c, const Value& value, V& shared, float* rows,
                                 float* columns) {
  constexpr int kPart = 16;
  const HalfPlace place;
  float row_sums[HalfPlace::kRows] = {};
#pragma unroll
  for (int first = 0; first < HalfPlace::kColumns; first += kPart) {
    float column_sums[kPart];
#pragma unroll
    for (int s = 0; s < kPart; ++s) {
#pragma unroll
      for (int r = 0; r < HalfPlace::kRows; ++r) {
        const Pair<float> both =
            value(c[HalfPlace::index(r, first + s)], place.row(r), place.column(first + s));
        row_sums[r] += both.row;
        column_sums[s] = r == 0 ? both.column : column_sums[s] + both.column;
      }
    }
    if (columns) {
      const int begin = fold_lanes<Sum, 4, 32>(column_sums, place.lane);
#pragma unroll
      for (int i = 0; i < kPart / 8; ++i) {
        shared.column_folds[place.warp][place.column(first + begin + i)] = column_sums[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; rows && r < HalfPlace::kRows; ++r) {
    float sum = row_sums[r] + __shfl_xor_sync(0xffffffffu, row_sums[r], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (place.lane % 4 == 0) rows[place.row(r)] = sum;
  }
  sync_warpgroup();
  if (columns) {
    for_extent<V>(kHopperTile.columns, 0, 0, [&](int j, bool, int64_t) {
      float sum = shared.column_folds[0][j];
      for (int w = 1; w < 4; ++w) sum += shared.column_folds[w][j];
      columns[j] = sum;
    });
  }
}

// The sums of the negatives, from the first of the warp's elements to the last.
__device__ inline void write_negatives(const Half& c, float scale, SumsVectors& vectors,
                                       const HalfOrigin& half, const Partials& partials) {
  const float scale2 = scale * static_cast<float>(kLog2E);
  fold_half(
      c,
      [&](float dot, int, int j) {
        const float e = exponential(dot, scale2, vectors.offset[j]);
        return Pair<float>{e, e};
      },
      vectors, half.rows_of(partials, kNumSums, kNegatives),
      half.columns_of(partials, kNumSums, kNegatives));
}

// The sums of the positives, which `of_rows` are the calling thread's.
__device__ inline void write_positives(const PositiveSums& of_rows, const SumsHalf& own,
                                       const HalfOrigin& half, const Partials& partials) {
  const HalfPlace place;
#pragma unroll
  for (int kind = kPositives; kind < kNumSums; ++kind) {
    float* rows = half.rows_of(partials, kNumSums, kind);
    float* columns = half.columns_of(partials, kNumSums, kind);
#pragma unroll
    for (int r = 0; r < HalfPlace::kRows; ++r) {
      if (place.lane % 4 == 0) rows[place.row(r)] = of_rows.at[kind - kPositives][r];
    }
    if (!columns) continue;
    const int j = static_cast<int>(threadIdx.x) % kWarpgroupThreads * 2;
    Vec<float, 2> sums{};
#pragma unroll
    for (int w = 0; w < kWarpgroupWarps; ++w) {
      if (!own.positives[w]) continue;
      const Vec<float, 2> folds = positive_folds(own.vectors, kind, w, j);
      sums.at[0] += folds.at[0];
      sums.at[1] += folds.at[1];
    }
    store(columns + j, sums);
  }
}

// One shift for all; others by boltzmann_sums_kernel.
template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    boltzmann_sums_hopper_kernel(const BoltzmannSumsParams params, const Block block,
                                 const Partials partials, const __grid_constant__ TensorMap z_hat,
                                 const __grid_constant__ TensorMap z) {
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  SumsShared& shared = *dynamic_shared<SumsShared>();
  const TileWalk walk = walk_block(block);
  const int steps = static_cast<int>(divide_up(input.width, kBoxSide));
  run_warpgroups(
      shared.ring, [&] { copy_features(shared.ring, walk, z_hat, z, block, steps); },
      [&](int consumer) {
        SumsHalf& own = shared.halves[consumer];
        const HalfPlace thread;
        const Muting muting(read_scalar<float>(input.scale));
        RingPlace place;
        walk([&](int row_tile, int column_tile) {
          const HalfOrigin half(block, row_tile, column_tile, consumer);
          const TileOrigin tile = half.in_c();
          stage_input<true>(own.vectors, input, tile);
          stage_offset(own.vectors, params.shift, tile);
          sync_warpgroup();
          const WarpRows rows = look_at_rows(own.vectors, input, tile);
          if (thread.lane == 0) own.positives[thread.warp] = rows.positives != 0;
          Half c;
          multiply_half<T, Major::kK, Major::kK>(shared.ring, place, consumer, steps, c);
          PositiveSums positives{};
          if (rows.ignored) mute_ignored(c, muting, own.vectors);
          if (rows.positives) {
            take_positives(c, rows.positives, muting, own.vectors, partials.columns, positives);
          }
          write_negatives(c, muting.scale, own.vectors, half, partials);
          write_positives(positives, own, half, partials);
        });
      });
}

}  // namespace m3i::boltzmann
