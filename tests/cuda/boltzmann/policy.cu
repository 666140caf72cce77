// boltzmann's tiles and blocks, tested by the compiler: this file is right if it compiles.
#include "boltzmann/kernels.cuh"

namespace m3i::boltzmann {

constexpr DType kBf16 = DType::kBFloat16, kFp32 = DType::kFloat32, kFp64 = DType::kFloat64;

// ---- Shared memory ------------------------------------------------------------------------------

static_assert(sizeof(Shared<BFloat16>) == shared_bytes(kBf16), "what the launcher asks for");
static_assert(sizeof(Shared<float>) == shared_bytes(kFp32), "float32");
static_assert(sizeof(Shared<double>) == shared_bytes(kFp64), "float64");

// Two blocks, and the kilobyte of each that the driver takes, fit the 164 KB of an A100's
// multiprocessor; one fits any card of compute capability 8.0 and later.
static_assert(2 * (shared_bytes(kBf16) + 1024) <= 164 * 1024, "two blocks");
static_assert(2 * (shared_bytes(kFp32) + 1024) <= 164 * 1024, "two blocks");
static_assert(shared_bytes(kBf16) <= 99 * 1024 && shared_bytes(kFp64) <= 99 * 1024, "8.6, 8.9");

// Rows of 16 bytes that ldmatrix reads at once, eight of them, lie in different banks.
constexpr bool rows_are_spread(int pitch_bytes) {
  unsigned banks = 0;
  for (int row = 0; row < 8; ++row) banks |= 1u << row * pitch_bytes / 16 % 8;
  return pitch_bytes % 16 == 0 && banks == 0xff;
}
static_assert(rows_are_spread(2 * pitch_along(tile_of(kBf16))), "rows along the summed axis");
static_assert(rows_are_spread(2 * pitch_across(128)), "rows across it");

// The 32 lanes of a tf32 fragment: column g of 8 and row t of 4, or the other way round.
constexpr bool words_are_spread(int of_g, int of_t) {
  unsigned banks = 0;
  for (int lane = 0; lane < 32; ++lane) banks |= 1u << (lane / 4 * of_g + lane % 4 * of_t) % 32;
  return banks == ~0u;
}
static_assert(words_are_spread(pitch_along(tile_of(kFp32)), 1), "rows along the summed axis");
static_assert(words_are_spread(1, pitch_across(128)), "rows across it");

// ---- Blocks -------------------------------------------------------------------------------------

constexpr int kArchitectures[] = {80, 86, 90, 100};

// Blocks cover N x M, none is empty, and none has more elements than allowed, save a single tile.
constexpr bool blocks_hold(DType dtype, int64_t rows, int64_t columns, int64_t elements) {
  const Tile tile = tile_of(dtype);
  const Blocks blocks = make_blocks(rows, columns, tile, elements);
  if (blocks.rows % tile.rows || blocks.columns % tile.columns) return false;
  if (blocks.rows * blocks.columns > elements) return false;
  if (blocks.down * blocks.rows < rows || (blocks.down - 1) * blocks.rows >= rows) return false;
  if (blocks.across * blocks.columns < columns) return false;
  if ((blocks.across - 1) * blocks.columns >= columns) return false;
  const Block last = make_block(blocks, tile, rows, columns, blocks.down - 1, blocks.across - 1);
  return last.row_tiles > 0 && last.row_begin + last.row_tiles * tile.rows >= rows &&
         last.row_begin + (last.row_tiles - 1) * tile.rows < rows && last.column_tiles > 0 &&
         last.column_begin + last.column_tiles * tile.columns >= columns && last.row_tiles <= 65535;
}

constexpr bool patches_hold(DType dtype, int64_t rows, int64_t columns) {
  const Tile tile = tile_of(dtype);
  const Blocks patches = make_patches(rows, columns, tile, kPatches);
  return patches.rows % tile.rows == 0 && patches.columns % tile.columns == 0 &&
         patches.down * patches.rows >= rows && (patches.down - 1) * patches.rows < rows &&
         patches.across * patches.columns >= columns &&
         (patches.across - 1) * patches.columns < columns && patches.down <= 65535;
}

constexpr bool all_blocks_hold() {
  constexpr int64_t kSizes[] = {1, 127, 128, 129, 1000, 4096, 21841, 32768, 1 << 20, (1 << 30) - 1};
  for (const int64_t rows : kSizes) {
    for (const int64_t columns : kSizes) {
      for (const DType dtype : {kBf16, kFp32, kFp64}) {
        if (!patches_hold(dtype, rows, columns)) return false;
        for (const int architecture : kArchitectures) {
          if (!blocks_hold(dtype, rows, columns, grads_elements(dtype, architecture))) return false;
        }
      }
    }
  }
  return true;
}
static_assert(all_blocks_hold(), "blocks of all sizes");

constexpr Blocks sums_patches(int64_t rows, int64_t columns) {
  return make_patches(rows, columns, tile_of(kBf16), kPatches);
}
static_assert(sums_patches(32768, 32768).down == 32 && sums_patches(32768, 32768).across == 32,
              "patches of 1024 x 1024");
static_assert(sums_patches(256, 256).rows == 128 && sums_patches(256, 256).columns == 128, "small");
static_assert(sums_patches(1, 1 << 20).across <= 1024, "a thin problem has wide patches");
static_assert(sums_patches(1 << 20, 1).down <= 1024, "or high ones");
static_assert(make_blocks(4100, 128, tile_of(kBf16), 4096 * 128).rows == 2176, "parts alike");

// Blocks of G lie in the second-level cache with room for the features of a block.
constexpr int64_t grads_bytes(DType dtype, int architecture) {
  const Blocks blocks =
      make_blocks(1 << 20, 1 << 20, tile_of(dtype), grads_elements(dtype, architecture));
  return blocks.rows * blocks.columns * bytes_of(dtype);
}
static_assert(grads_bytes(kBf16, 80) > 20 << 20 && grads_bytes(kBf16, 80) <= 25165824, "40 MB");
static_assert(grads_bytes(kBf16, 90) == 32 << 20 && grads_bytes(kFp64, 90) <= 32 << 20, "50 MB");

constexpr Blocks kNone = make_patches(0, 7, tile_of(kBf16), kPatches);
static_assert(kNone.down == 0 && kNone.across == 1, "no rows: no blocks, and their shape is real");
static_assert(kNone.rows == 128 && kNone.columns == 128, "one tile");

}  // namespace m3i::boltzmann
