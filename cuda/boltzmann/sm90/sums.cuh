// boltzmann: the kernel of boltzmann_sums on compute capability 9.0. Device code only.
//
// Logits, exponentials and sums over rows and columns all happen in the registers that the product
// left them in. A thread has two rows: their sums take two shuffles each. Its 64 columns are folded
// 16 at a time by exchanging halves, 14 shuffles each time and 56 for all.
#pragma once

#include "boltzmann/sm80/sums.cuh"
#include "boltzmann/sm90/warpgroup.cuh"

namespace m3i::boltzmann {

using HalfVectors = Vectors<float, kHalfRows, kHopperTile.columns, 4, 1>;

struct HalfShared {
  HalfVectors vectors;
  bool mixed[kWarpgroupThreads / kWarpLanes];  // what each warp saw: positives or ignored rows
};

struct HopperShared {
  Ring ring;
  HalfShared halves[kConsumers];
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

// After the vectors were staged: they are there for all threads, and each warp notes what it saw.
__device__ inline void note_mixed(HalfShared& to, const BoltzmannInput& input,
                                  const TileOrigin& tile) {
  sync_warpgroup();
  const bool seen =
      thread_sees_positive(to.vectors, input, tile) || thread_sees_ignored(to.vectors);
  const HalfPlace place;
  const bool warp_saw = __any_sync(0xffffffffu, seen);
  if (place.lane == 0) to.mixed[place.warp] = warp_saw;
}

// Once the other warps have noted theirs.
__device__ inline bool is_mixed(const HalfShared& of) {
  sync_warpgroup();
  return of.mixed[0] | of.mixed[1] | of.mixed[2] | of.mixed[3];
}

// Adds value(c, i, j) of all elements up over rows and over columns of the half, to rows[0, 64) and
// columns[0, 256) in global memory; nothing where one is null. Ends with a barrier.
template <class Value>
__device__ inline void fold_half(const Half& c, const Value& value, HalfVectors& shared,
                                 float* rows, float* columns) {
  constexpr int kPart = 16;
  const HalfPlace place;
  float row_sums[HalfPlace::kRows] = {};
#pragma unroll
  for (int first = 0; first < HalfPlace::kColumns; first += kPart) {
    float column_sums[kPart];
#pragma unroll
    for (int s = 0; s < kPart; ++s) {
      column_sums[s] = 0;
#pragma unroll
      for (int r = 0; r < HalfPlace::kRows; ++r) {
        const Pair<float> both =
            value(c[HalfPlace::index(r, first + s)], place.row(r), place.column(first + s));
        row_sums[r] += both.row;
        column_sums[s] += both.column;
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
    for_extent<HalfVectors>(kHopperTile.columns, 0, 0, [&](int j, bool, int64_t) {
      float sum = shared.column_folds[0][j];
      for (int w = 1; w < 4; ++w) sum += shared.column_folds[w][j];
      columns[j] = sum;
    });
  }
  sync_warpgroup();  // the folds may be written again
}

__device__ inline void write_zeros_of_half(float* to, int size) {
  if (!to) return;
  for_extent<HalfVectors>(size, 0, 0, [&](int i, bool, int64_t) { to[i] = 0; });
}

// The sums of a half without positives and ignored rows test nothing of its elements.
__device__ inline void write_sums(const Half& c, float scale, bool mixed, HalfVectors& vectors,
                                  const HalfOrigin& half, const Partials& partials) {
  const SumsTile<HalfVectors, SumsMode::kShared> values{vectors, scale};
#pragma unroll 1
  for (int kind = 0; kind < kNumSums; ++kind) {
    float* rows = half.rows_of(partials, kNumSums, kind);
    float* columns = half.columns_of(partials, kNumSums, kind);
    if (mixed) {
      fold_half(
          c, [&](float dot, int i, int j) { return values.any(0, kind, dot, i, j); }, vectors, rows,
          columns);
    } else if (kind == kNegatives) {
      fold_half(
          c, [&](float dot, int i, int j) { return values.negative(0, dot, i, j); }, vectors, rows,
          columns);
    } else {
      write_zeros_of_half(rows, kHalfRows);
      write_zeros_of_half(columns, kHopperTile.columns);
    }
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
  HopperShared& shared = *dynamic_shared<HopperShared>();
  const TileWalk walk = walk_block(block);
  const int steps = static_cast<int>(divide_up(input.width, kBoxSide));
  run_warpgroups(
      shared.ring, [&] { copy_features(shared.ring, walk, z_hat, z, block, steps); },
      [&](int consumer) {
        HalfShared& own = shared.halves[consumer];
        const float scale = read_scalar<float>(input.scale);
        RingPlace place;
        walk([&](int row_tile, int column_tile) {
          const HalfOrigin half(block, row_tile, column_tile, consumer);
          const TileOrigin tile = half.in_c();
          stage_input<true>(own.vectors, input, tile);
          stage_shift(own.vectors, input, params.shift, tile, false);
          note_mixed(own, input, tile);
          Half c;
          multiply_half<T, Major::kK, Major::kK>(shared.ring, place, consumer, steps, c);
          write_sums(c, scale, is_mixed(own), own.vectors, half, partials);
        });
      });
}

}  // namespace m3i::boltzmann
