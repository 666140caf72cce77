// When boltzmann takes warpgroups, and what they take, tested by the compiler: this file is right
// if it compiles.
#include "boltzmann/sm90/grads.cuh"

namespace m3i::boltzmann {

constexpr DType kBf16 = DType::kBFloat16;

// ---- When ---------------------------------------------------------------------------------------

static_assert(takes_warpgroups(90, kBf16, 1, 1, 8, 0), "the least");
static_assert(takes_warpgroups(90, DType::kFloat16, 1 << 20, 21841, 1024, 16), "half");
static_assert(!takes_warpgroups(80, kBf16, 64, 64, 64, 0), "no wgmma before");
static_assert(!takes_warpgroups(100, kBf16, 64, 64, 64, 0), "nor after");
static_assert(!takes_warpgroups(90, DType::kFloat32, 64, 64, 64, 0), "of 16 bits alone");
static_assert(!takes_warpgroups(90, DType::kFloat64, 64, 64, 64, 0), "of 16 bits alone");
static_assert(!takes_warpgroups(90, kBf16, 64, 64, 4, 0), "rows begin at multiples of 16 bytes");
static_assert(!takes_warpgroups(90, kBf16, 64, 64, 64, 8), "and so does the first one");
static_assert(!takes_warpgroups(90, kBf16, 0, 64, 64, 0), "a matrix of no rows has no map");
static_assert(!takes_warpgroups(90, kBf16, 64, 0, 64, 0), "nor has the other one");
static_assert(!takes_warpgroups(90, kBf16, 64, 64, 0, 0), "or one of no columns");

// ---- Shared memory ------------------------------------------------------------------------------

static_assert(sizeof(Box) == 8192 && alignof(Box) == 1024, "whole patterns of the swizzle");
static_assert(sizeof(RingStage) == 48 * 1024, "no gaps: its bytes are those that are expected");
static_assert(sizeof(HopperShared) <= 227 * 1024, "what a block may have");
static_assert(sizeof(SumsShared) <= 227 * 1024, "likewise");
static_assert(kHopperTile.depth == kBoxSide && kHalfRows == kBoxSide, "a box of A a warpgroup");

// ---- Tiles --------------------------------------------------------------------------------------

static_assert(persistent_clusters(5, 132) == 5 && persistent_clusters(512, 132) == 66, "pairs");

constexpr Blocks grads_blocks(int64_t rows, int64_t columns) {
  return make_blocks(rows, columns, kHopperTile, grads_elements(kBf16, 90));
}
static_assert(grads_blocks(32768, 32768).rows == 4096, "G of 32 MB");
static_assert(grads_blocks(32768, 32768).columns == 4096, "G of 32 MB");
static_assert(make_hopper_patches(8192, 8192).columns == 256, "a patch of one tile");
static_assert(make_hopper_patches(16384, 16384).columns == 512, "two column tiles in a patch");
static_assert(grads_blocks(1, 1).rows == 256 && grads_blocks(1, 1).columns == 256, "one tile");

// Every element of a half belongs to one thread, and to one of its registers.
constexpr bool half_is_covered() {
  for (int r = 0; r < HalfPlace::kRows; ++r) {
    for (int s = 0; s < HalfPlace::kColumns; ++s) {
      const int at = HalfPlace::index(r, s);
      if (at < 0 || at >= kHopperTile.columns / 2) return false;
      if (at % 4 / 2 != r || at % 2 != s % 2 || at / 4 != s / 2) return false;
    }
  }
  return HalfPlace::kRows * HalfPlace::kColumns == kHopperTile.columns / 2;
}
static_assert(half_is_covered(), "as wgmma leaves them");

}  // namespace m3i::boltzmann
