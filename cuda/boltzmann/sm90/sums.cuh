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

// The patches that a cluster takes, one after the other, and their tiles.
struct PatchWalk {
  Blocks patches;
  int64_t rows, columns;  // of C

  // body(patch, the place of the patch, row tile and column tile in it)
  template <class Body>
  __device__ void operator()(const Body& body) const {
    const int across = static_cast<int>(patches.across);
    const int all = static_cast<int>(patches.down) * across;
    const int clusters = gridDim.x / kClusterBlocks;
    for (int i = blockIdx.x / kClusterBlocks; i < all; i += clusters) {
      const Block patch = make_hopper_block(patches, rows, columns, i / across, i % across);
      for (int row_tile = 0; row_tile < patch.row_tiles; ++row_tile) {
        for (int column_tile = 0; column_tile < patch.column_tiles; ++column_tile) {
          body(patch, i, row_tile, column_tile);
        }
      }
    }
  }
};

// The first row in the tile of the thread block's part.
__device__ inline int block_row() { return static_cast<int>(cluster_rank()) * kBlockRows; }

// Sums over tiles in global memory, to be reduced over their lines.
struct LineSums {
  float* rows;            // [lines, kinds, height], or null
  float* columns;         // [lines, kinds, width], or null
  int64_t height, width;  // whole tiles
};

// Where one thread alone adds, in a fixed order; the first time it overwrites.
struct AddTo {
  float* to;  // or null
  bool first;

  __device__ explicit operator bool() const { return to; }
  __device__ float before(int i) const { return first ? 0 : __ldcg(to + i); }
};

// A warpgroup's half of a tile of a block of C.
struct HalfOrigin {
  static constexpr int kColumns = kHopperTile.columns;

  const Block& block;
  int half, column_tile;  // in the block, counted in halves and in tiles

  __device__ HalfOrigin(const Block& block, int row_tile, int column_tile, int consumer)
      : block(block),
        half((row_tile * kHopperTile.rows + block_row()) / kHalfRows + consumer),
        column_tile(column_tile) {}

  __device__ TileOrigin in_c() const {
    return {block.row_begin + half * kHalfRows, block.column_begin + column_tile * kColumns};
  }
  __device__ AddTo rows_of(const LineSums& sums, int64_t line, bool first) const {
    return {sums.rows ? sums.rows + line * sums.height + in_c().row : nullptr, first};
  }
  __device__ AddTo columns_of(const LineSums& sums, int64_t line, bool first) const {
    return {sums.columns ? sums.columns + line * sums.width + in_c().column : nullptr, first};
  }
};

// By the thread that copies: the features of a tile's rows and columns, for their dot products.
__device__ inline void copy_features(Ring& ring, RingPlace& place, const TensorMap& z_hat,
                                     const TensorMap& z, const Block& block, int row_tile,
                                     int column_tile, int steps) {
  const int row = static_cast<int>(block.row_begin) + row_tile * kHopperTile.rows + block_row();
  const int column = static_cast<int>(block.column_begin) + column_tile * kHopperTile.columns;
  copy_operands<Major::kK, Major::kK>(ring, place, {z_hat, z, row, 0, column, 0, steps});
}

// Adds value(c, i, j) of all elements up over rows and over columns of the half, to rows[0, 64) and
// columns[0, 256) in global memory; nothing where one is null. A barrier stands between what is
// read of `shared` and the end.
template <class V, class Value>
__device__ inline void fold_half(const Half& c, const Value& value, V& shared, const AddTo& rows,
                                 const AddTo& columns) {
  constexpr int kPart = 16, kColumns = kHopperTile.columns;
  const HalfPlace place;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  float before_rows[HalfPlace::kRows], before_columns[kColumns / kWarpgroupThreads];
#pragma unroll
  for (int r = 0; rows && r < HalfPlace::kRows; ++r) {
    if (place.lane % 4 == 0) before_rows[r] = rows.before(place.row(r));  // the lane that adds
  }
#pragma unroll
  for (int i = 0; columns && i < kColumns / kWarpgroupThreads; ++i) {
    before_columns[i] = columns.before(i * kWarpgroupThreads + thread);
  }
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
    if (place.lane % 4 == 0) rows.to[place.row(r)] = before_rows[r] + sum;
  }
  sync_warpgroup();
#pragma unroll
  for (int i = 0; columns && i < kColumns / kWarpgroupThreads; ++i) {
    const int j = i * kWarpgroupThreads + thread;
    float sum = shared.column_folds[0][j];
    for (int w = 1; w < kWarpgroupWarps; ++w) sum += shared.column_folds[w][j];
    columns.to[j] = before_columns[i] + sum;
  }
}

// Where a half leaves its sums: one line of them for all rows of patches, and one for each quarter
// of the patches' columns.
struct SumsPlace {
  const HalfOrigin& half;
  const LineSums& sums;
  int64_t row_line, column_line;
  bool first_of_rows, first_of_columns;

  __device__ SumsPlace(const HalfOrigin& half, const LineSums& sums, const Blocks& patches,
                       int patch, int row_tile, int column_tile)
      : half(half),
        sums(sums),
        row_line(patch % static_cast<int>(patches.across)),
        column_line(patch / static_cast<int>(patches.across) * kHalves + half.half % kHalves),
        first_of_rows(column_tile == 0),
        first_of_columns(row_tile == 0) {}

  __device__ AddTo rows(int kind) const {
    return half.rows_of(sums, row_line * kNumSums + kind, first_of_rows);
  }
  __device__ AddTo columns(int kind) const {
    return half.columns_of(sums, column_line * kNumSums + kind, first_of_columns);
  }
};

__device__ inline void write_negatives(const Half& c, float scale, SumsVectors& vectors,
                                       const SumsPlace& to) {
  const float scale2 = scale * static_cast<float>(kLog2E);
  fold_half(
      c,
      [&](float dot, int, int j) {
        const float e = exponential(dot, scale2, vectors.offset[j]);
        return Pair<float>{e, e};
      },
      vectors, to.rows(kNegatives), to.columns(kNegatives));
}

// Of a kind of positives, which `of_rows` are the calling thread's.
__device__ inline void write_row_sums(const float (&of_rows)[HalfPlace::kRows], const AddTo& to) {
  const HalfPlace place;
  if (place.lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    const int i = place.row(r);
    to.to[i] = to.before(i) + of_rows[r];
  }
}

__device__ inline void write_column_sums(const SumsHalf& own, int kind, const AddTo& to) {
  const int j = static_cast<int>(threadIdx.x) % kWarpgroupThreads * 2;
  float2* place = reinterpret_cast<float2*>(to.to + j);
  float2 sums = to.first ? float2{0, 0} : __ldcg(place);
#pragma unroll
  for (int w = 0; w < kWarpgroupWarps; ++w) {
    if (!own.positives[w]) continue;
    const Vec<float, 2> folds = positive_folds(own.vectors, kind, w, j);
    sums.x += folds.at[0];
    sums.y += folds.at[1];
  }
  *place = sums;
}

// After the barrier of the negatives. Where there are no positives it is only to begin with zeros.
__device__ inline void write_positives(const PositiveSums& of_rows, const WarpRows& rows,
                                       const SumsHalf& own, const SumsPlace& to) {
  const bool of_half = own.positives[0] | own.positives[1] | own.positives[2] | own.positives[3];
  const bool write_rows = to.first_of_rows || rows.positives;
  const bool write_columns = to.sums.columns && (to.first_of_columns || of_half);
#pragma unroll
  for (int kind = kPositives; kind < kNumSums; ++kind) {
    if (write_rows) write_row_sums(of_rows.at[kind - kPositives], to.rows(kind));
    if (write_columns) write_column_sums(own, kind, to.columns(kind));
  }
}

// One shift for all; others by boltzmann_sums_kernel.
template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    boltzmann_sums_hopper_kernel(const BoltzmannSumsParams params, const Blocks patches,
                                 const LineSums sums, const __grid_constant__ TensorMap z_hat,
                                 const __grid_constant__ TensorMap z) {
  const BoltzmannInput& input = params.input;
  if (is_skipped(input)) return;
  SumsShared& shared = *dynamic_shared<SumsShared>();
  const PatchWalk walk{patches, input.rows, input.columns};
  const int steps = static_cast<int>(divide_up(input.width, kBoxSide));
  run_warpgroups(
      shared.ring,
      [&] {
        RingPlace place;
        walk([&](const Block& patch, int, int row_tile, int column_tile) {
          copy_features(shared.ring, place, z_hat, z, patch, row_tile, column_tile, steps);
        });
      },
      [&](int consumer) {
        SumsHalf& own = shared.halves[consumer];
        const HalfPlace thread;
        const Muting muting(read_scalar<float>(input.scale));
        RingPlace place;
        walk([&](const Block& patch, int number, int row_tile, int column_tile) {
          const HalfOrigin half(patch, row_tile, column_tile, consumer);
          const SumsPlace to(half, sums, patches, number, row_tile, column_tile);
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
            take_positives(c, rows.positives, muting, own.vectors, sums.columns, positives);
          }
          write_negatives(c, muting.scale, own.vectors, to);
          write_positives(positives, rows, own, to);
        });
      });
}

}  // namespace m3i::boltzmann
