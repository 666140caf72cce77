// boltzmann on CUDA: the division of a call into tiles and blocks; pure functions.
//
// A thread block computes a tile of C. Tiles are computed block by block, so that their results
// (partial sums, or the gradient by their logits) take the same memory for all N and M.
#pragma once

#include "boltzmann/params.h"
#include "boltzmann/tiles.h"

namespace m3i::boltzmann {

inline constexpr int kWarpLanes = 32;

// The tile of a product that a thread block computes, `depth` terms of its dot products at a time.
struct Tile {
  int rows, columns;
  int depth;
  int stages;  // slices of `depth` terms in shared memory
  int warps_down, warps_across;
};

M3I_HOST_DEVICE constexpr int threads_of(const Tile& tile) {
  return tile.warps_down * tile.warps_across * kWarpLanes;
}

M3I_HOST_DEVICE constexpr int64_t divide_up(int64_t size, int64_t part) {
  return (size + part - 1) / part;
}

M3I_HOST_DEVICE constexpr int bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Bytes of a sum, a shift or a weight.
M3I_HOST_DEVICE constexpr int wide_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// A row of `depth` terms has 64 bytes. Four warps of 64 x 64 read each byte of shared memory a
// third less often than eight of 64 x 32, whose reads and copies would take as long as the
// products; their sums take 128 registers, and two blocks share a multiprocessor.
M3I_HOST_DEVICE constexpr Tile make_tile(const Policy& policy, DType dtype) {
  return {policy.side,   policy.side,       64 / bytes_of(dtype),
          policy.stages, policy.warps_down, policy.warps_across};
}

// float64 serves tests and small problems, and is not tuned.
M3I_HOST_DEVICE constexpr Tile tile_of(DType dtype) {
  constexpr Policy kFloat64Policy{64, 3, 2, 2};
  return make_tile(dtype == DType::kFloat64   ? kFloat64Policy
                   : dtype == DType::kFloat32 ? float_policy()
                                              : half_policy(),
                   dtype);
}

// Warps divide a tile into fragments of 16 x 16, and all threads copy the same number of rows.
M3I_HOST_DEVICE constexpr bool is_legal(const Policy& policy) {
  const int warps = policy.warps_down * policy.warps_across;
  return policy.stages >= 2 && warps >= 1 && warps <= 32 &&
         policy.side % (policy.warps_down * 16) == 0 &&
         policy.side % (policy.warps_across * 16) == 0 && policy.side % (warps * 8) == 0;
}
static_assert(is_legal(half_policy()) && is_legal(float_policy()),
              "cuda/boltzmann/tiles.json: a tile that its warps cannot share out");

// ---- Shared memory ------------------------------------------------------------------------------

// Elements from row to row of an operand's tile. Eight rows of 16 bytes, from any column on, lie in
// different banks, and so do eight columns of four rows of float32.
M3I_HOST_DEVICE constexpr int pitch_along(const Tile& tile) { return tile.depth + tile.depth / 4; }
M3I_HOST_DEVICE constexpr int pitch_across(int side) { return side + 8; }

// Elements of an operand's tile, its rows either along or across the summed axis.
M3I_HOST_DEVICE constexpr int operand_elements(const Tile& tile, int side) {
  const int along = side * pitch_along(tile), across = tile.depth * pitch_across(side);
  return along > across ? along : across;
}

// Arrays over the tile's rows and columns: ids, shift, bias, weights, and the warps' sums.
M3I_HOST_DEVICE constexpr int vector_bytes(const Tile& tile, int wide) {
  return tile.rows * (4 + (1 + kNumWeights + tile.warps_across) * wide) +
         tile.columns * (4 + (3 + kNumWeights + tile.warps_down) * wide);
}

M3I_HOST_DEVICE constexpr int shared_bytes(DType dtype) {
  const Tile tile = tile_of(dtype);
  const int elements = operand_elements(tile, tile.rows) + operand_elements(tile, tile.columns);
  return tile.stages * elements * bytes_of(dtype) + vector_bytes(tile, wide_bytes(dtype));
}

// ---- Blocks -------------------------------------------------------------------------------------

// The tiles between two reductions; all blocks of a call but the last ones have the same size.
struct Blocks {
  int64_t rows, columns;  // of a block, multiples of the tile's
  int64_t down, across;   // their numbers
};

struct Block {
  int64_t row_begin, column_begin;
  int64_t row_tiles, column_tiles;
};

// The gradient by a block's logits is written to and read twice from the L2 cache: 40 MB on compute
// capability 8.0, 50 on 9.0.
M3I_HOST_DEVICE constexpr int64_t grads_elements(DType dtype, int architecture) {
  return (int64_t{architecture >= 90 ? kGradsMibH100 : kGradsMibA100} << 20) / bytes_of(dtype);
}

namespace detail {

// The length, in whole `units`, of about equal parts that cover `size`, none longer than `most`.
M3I_HOST_DEVICE constexpr int64_t part_of(int64_t size, int64_t most, int64_t unit) {
  const int64_t whole = most / unit * unit;
  const int64_t parts = divide_up(size, whole > unit ? whole : unit);
  return parts == 0 ? unit : divide_up(divide_up(size, parts), unit) * unit;
}

// The square root, rounded down, by Newton's method.
M3I_HOST_DEVICE constexpr int64_t square_root(int64_t value) {
  int64_t root = value;
  while (root > value / root) root = (root + value / root) / 2;
  return root;
}

}  // namespace detail

// Blocks of at most `elements`, as square as N and M allow.
M3I_HOST_DEVICE constexpr Blocks make_blocks(int64_t rows, int64_t columns, const Tile& tile,
                                             int64_t elements) {
  const int64_t side = detail::square_root(elements);
  const int64_t narrow = detail::part_of(columns, side, tile.columns);
  Blocks blocks{};
  blocks.rows = detail::part_of(rows, elements / narrow, tile.rows);
  blocks.columns = detail::part_of(columns, elements / blocks.rows, tile.columns);
  blocks.down = divide_up(rows, blocks.rows);
  blocks.across = divide_up(columns, blocks.columns);
  return blocks;
}

M3I_HOST_DEVICE constexpr Block make_block(const Blocks& blocks, const Tile& tile, int64_t rows,
                                           int64_t columns, int64_t down, int64_t across) {
  const int64_t row = down * blocks.rows, column = across * blocks.columns;
  const int64_t height = rows - row < blocks.rows ? rows - row : blocks.rows;
  const int64_t width = columns - column < blocks.columns ? columns - column : blocks.columns;
  return {row, column, divide_up(height, tile.rows), divide_up(width, tile.columns)};
}

// Sums: the tiles of a patch, a block, follow one another in one thread block or cluster, which
// adds them up in memory; one reduction follows for all patches. So many patches are shared out
// evenly, and leave 32 sums of each kind by row and by column. Twice as many down and across where
// no cluster goes on from one patch to the next.
inline constexpr int64_t kPatches = 1024;
inline constexpr int64_t kManyPatches = 4 * kPatches;

M3I_HOST_DEVICE constexpr Blocks make_patches(int64_t rows, int64_t columns, const Tile& tile,
                                              int64_t most) {
  const int64_t tiles = divide_up(rows, tile.rows) * divide_up(columns, tile.columns);
  const int64_t of_patch = tiles > most ? divide_up(tiles, most) : 1;
  return make_blocks(rows, columns, tile, of_patch * tile.rows * tile.columns);
}

}  // namespace m3i::boltzmann
